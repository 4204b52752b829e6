"""Annotated boxes of many images, in a few flat arrays: what every format is read into."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Narrower boxes, in pixels, would lose their extent to rounding when a detector scales them down, and stop it.
SMALLEST = 0.01


class ImageBoxes(NamedTuple):
    """Hold the boxes of one image.

    Args:
        boxes: (n, 4) float32 left, top, right, bottom in pixels.
        labels: (n,) int64 from 1.
        area: (n,) float32, pixels of the object, or of its box where nobody said.
        iscrowd: (n,) int64, 1 for a region that holds many objects or is not to be counted.
    """

    boxes: Tensor
    labels: Tensor
    area: Tensor
    iscrowd: Tensor

    def keep(self, chosen: Tensor) -> "ImageBoxes":
        """Return the boxes that a (n,) bool mask chooses."""
        return ImageBoxes(*(part[chosen] for part in self))


@dataclass(frozen=True)
class Annotations:
    """Hold the boxes of N images; few large tensors, so that worker processes share them.

    Args:
        image_ids: (N,) int64.
        starts: (N + 1,) int64; the boxes of image i are those from starts[i] to starts[i + 1].
        boxes: those of all images, one after the other.
    """

    image_ids: Tensor
    starts: Tensor
    boxes: ImageBoxes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image_ids)

    def of(self, index: int) -> ImageBoxes:
        """Return the boxes of one image."""
        start, end = self.starts[index : index + 2].tolist()
        return ImageBoxes(*(part[start:end] for part in self.boxes))

    def without_crowds(self) -> "Annotations":
        """Return the annotations without crowd boxes, for training."""
        kept = self.boxes.iscrowd == 0
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
        return Annotations(self.image_ids, counts[self.starts], self.boxes.keep(kept))

    def select(self, indices: list[int]) -> "Annotations":
        """Return the annotations of some images, in the given order."""
        return gather(self.image_ids[indices].tolist(), (self.of(index) for index in indices))


def gather(image_ids: Iterable[int], images: Iterable[ImageBoxes]) -> Annotations:
    """Put the boxes of images together, in their order."""
    listed = list(images)
    starts = torch.tensor([0, *(len(one.labels) for one in listed)]).cumsum(0)
    parts = [torch.cat(part) for part in zip(no_boxes(), *listed, strict=True)]
    return Annotations(torch.tensor(list(image_ids), dtype=torch.int64), starts, ImageBoxes(*parts))


def no_boxes() -> ImageBoxes:
    """Return the boxes of an image without any."""
    integers = torch.zeros(0, dtype=torch.int64)
    return ImageBoxes(torch.zeros(0, 4), integers, torch.zeros(0), integers)


def measurable(boxes: Tensor) -> Tensor:
    """Return which boxes have an extent, (n,) bool; those with NaN have none.

    Args:
        boxes: (n, 4) left, top, right, bottom in pixels.
    """
    return ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(dim=1) & boxes.isfinite().all(dim=1)
