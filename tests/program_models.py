"""Models of one's own that are exported as programs, or cannot be."""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator


class FixedBatch(nn.Module):
    """Knows how many images it was followed with."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.layer(one[None]).mean((0, 2, 3)) for one in images])


class Undecided(FixedBatch):
    """Lets the pixels decide in Python."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.layer(images).mean((2, 3))
        return logits if logits.sum().item() > 0 else -logits


class Random(FixedBatch):
    """Never returns the same twice."""

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).mean((2, 3)) + torch.rand(len(images), 1)


class Checked(FixedBatch):
    """Makes sure of its input by an operator that transformers' D-FINE uses."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.layer(images).mean((2, 3))
        return torch.where(torch.ops.aten._is_all_true(images == images), logits, -logits)


class Coarse(nn.Module):
    """A segmenter of stride 32, as far as is known, whose map is smaller than the image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 3, stride=4, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.layer(images)}


class Pooled(Coarse):
    """A segmenter that adds means of 3x3 parts of the image, as PSPNet does, whose borders a graph fixes."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.layer(images)
        parts = nn.functional.adaptive_avg_pool2d(maps, 3)
        return {"out": maps + nn.functional.interpolate(parts, maps.shape[-2:], mode="bilinear")}


class Halved(Coarse):
    """A segmenter that looks at half of the rows, a number that the format of exported programs cannot compute."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        rows = math.ceil(0.5 * images.shape[2])
        return {"out": self.layer(nn.functional.interpolate(images, (rows, images.shape[3])))}


class Tied(FixedBatch):
    """Returns the best positions of a score that is the same everywhere, as an untrained RT-DETR does."""

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer(images).flatten(2)
        best = torch.zeros_like(maps[:, 0]).topk(5).indices
        return maps.gather(2, best[:, None].expand(-1, maps.shape[1], -1)).mean(2)


class OneLevel(nn.Module):
    """A backbone of one map of stride 8."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 32, 8, stride=8)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return OrderedDict(p3=self.layer(images))


def fixed_batch(num_classes: int) -> nn.Module:
    return FixedBatch(num_classes)


def undecided(num_classes: int) -> nn.Module:
    return Undecided(num_classes)


def random(num_classes: int) -> nn.Module:
    return Random(num_classes)


def checked(num_classes: int) -> nn.Module:
    return Checked(num_classes)


def coarse(num_classes: int) -> nn.Module:
    return Coarse(num_classes)


def pooled(num_classes: int) -> nn.Module:
    return Pooled(num_classes)


def halved(num_classes: int) -> nn.Module:
    return Halved(num_classes)


def tied(num_classes: int) -> nn.Module:
    return Tied(num_classes)


def tiny_fcos(num_classes: int, **options: Any) -> nn.Module:
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    return FCOS(OneLevel(), num_classes + 1, min_size=32, max_size=64, anchor_generator=anchors)
