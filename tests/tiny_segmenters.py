"""Segmenters that train in milliseconds, named by `path:function` as a user's own are."""

from torch import Tensor, nn


def small(num_classes: int, in_channels: int) -> nn.Module:
    return Segmenter(num_classes, in_channels, 6, stride=4)


def large(num_classes: int, in_channels: int) -> nn.Module:
    return Segmenter(num_classes, in_channels, 12, stride=4)


def fine(num_classes: int, in_channels: int) -> nn.Module:
    return Segmenter(num_classes, in_channels, 12, stride=2)


def seven_classes(in_channels: int) -> nn.Module:
    return Segmenter(7, in_channels, 12, stride=4)


def pointwise(num_classes: int, in_channels: int) -> nn.Module:
    """Every pixel for itself: it makes no difference in which window it is seen."""
    return nn.Sequential(nn.Conv2d(in_channels, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, num_classes, 1))


class Segmenter(nn.Module):
    """Scores positions at a fraction of the size; what up-samples is the task."""

    def __init__(self, classes: int, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1)
        )
        self.scorer = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.scorer(self.body(images))
        return scores


class Pooled(Segmenter):
    """With an image-level branch, as PSPNet and DeepLabV3 have it: BatchNorm on a single position."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__(classes, channels, 8, stride=4)
        self.image_level = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        maps = self.body(images)
        scores: Tensor = self.scorer(maps + self.image_level(maps))
        return scores


def pooled(num_classes: int, in_channels: int) -> nn.Module:
    return Pooled(num_classes, in_channels)
