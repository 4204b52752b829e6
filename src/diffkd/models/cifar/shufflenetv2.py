"""ShuffleNetV2 (Ma et al. 2018) at size 1 for small images, as in the CRD benchmark: a 1x1 stem, no max pooling."""

import torch
from torch import Tensor, nn

from diffkd.models.cifar.resnet import kaiming_init


class BasicUnit(nn.Module):
    """Convolve one half of the channels, keep the other, and shuffle both together.

    Args:
        channels: even number of channels of input and output (B, channels, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _pointwise_depthwise_pointwise(channels // 2, channels // 2, stride=1)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shuffled halves."""
        kept, convolved = x.chunk(2, dim=1)
        output: Tensor = self.shuffle(torch.cat([kept, self.branch(convolved)], dim=1))
        return output


class DownUnit(nn.Module):
    """Halve the resolution in two branches over all channels, and shuffle both together.

    Args:
        in_channels: channels of the input (B, in_channels, H, W).
        channels: even number of channels of the output (B, channels, H / 2, W / 2).
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, channels // 2, 1, bias=False),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(),
        )
        self.branch = _pointwise_depthwise_pointwise(in_channels, channels // 2, stride=2)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shuffled outputs of both branches."""
        output: Tensor = self.shuffle(torch.cat([self.shortcut(x), self.branch(x)], dim=1))
        return output


class CifarShuffleNetV2(nn.Module):
    """ShuffleNetV2 with stages of 116, 232 and 464 channels at a half, a quarter and an eighth of the resolution.

    Args:
        num_classes: length of the output.
        in_channels: channels of the images, which may have any height and width.
    """

    def __init__(self, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        self.layer1 = _stage(24, 116, basic_units=3)
        self.layer2 = _stage(116, 232, basic_units=7)
        self.layer3 = _stage(232, 464, basic_units=3)
        self.head = nn.Sequential(nn.Conv2d(464, 1024, 1, bias=False), nn.BatchNorm2d(1024), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)
        kaiming_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_channels, H, W)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.head(self.layer3(self.layer2(self.layer1(features))))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, basic_units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, channels), *[BasicUnit(channels) for _ in range(basic_units)])


def _pointwise_depthwise_pointwise(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def shufflenetv2(num_classes: int = 100, in_channels: int = 3) -> CifarShuffleNetV2:
    """Return ShuffleNetV2 at size 1 for small images (1.36 M parameters)."""
    return CifarShuffleNetV2(num_classes, in_channels)
