"""Labelled images in memory, checked."""

from typing import NamedTuple

import torch
from torch import Tensor


class ImageSet(NamedTuple):
    """Hold images and their labels.

    Args:
        images: (N, C, H, W) uint8, or finite floats.
        labels: (N,) int64 in [0, number of classes).
    """

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "ImageSet":
        """Return the set on a device; itself where it is there already."""
        return ImageSet(self.images.to(device), self.labels.to(device))


def check_image_set(data: ImageSet, num_classes: int, name: str) -> None:
    """Refuse a set that cannot be trained or evaluated on.

    Args:
        data: the set.
        num_classes: labels must be in [0, num_classes).
        name: the file or folder to name in errors.

    Raises:
        ValueError: if the set is empty, numbers of images and labels differ, a label is out of range, or a pixel is
            NaN or infinite; names the first bad index.
    """
    images, labels = data
    if len(images) != len(labels):
        raise ValueError(f"{name}: {len(images)} images but {len(labels)} labels; give one label per image.")
    if not images.numel():
        raise ValueError(f"{name}: no images, shape {tuple(images.shape)}; give at least one.")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        index = int(outside.nonzero()[0])
        raise ValueError(
            f"{name}: label {int(labels[index])} at index {index} is out of range for {num_classes} classes "
            f"({int(outside.sum())} such labels); labels count from 0 to {num_classes - 1}."
        )
    if images.is_floating_point():
        bad = ~images.isfinite().flatten(1).all(dim=1)
        if bad.any():
            index = int(bad.nonzero()[0])
            raise ValueError(
                f"{name}: image {index} holds NaN or infinity ({int(bad.sum())} such images); remove or mend them."
            )
