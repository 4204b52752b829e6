"""Labelled images in memory: checks, and loaders over training and test set."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from diffkd.data.classification.augmentation import Augmentation
from diffkd.data.classification.device_loader import DeviceLoader
from diffkd.data.image_data import ImageData, placement
from diffkd.data.loaders import BANK, HELD_OUT, InTurn
from diffkd.data.statistics import channel_statistics, pixel_unit


class ImageSet(NamedTuple):
    """Images and their labels.

    Args:
        images: (N, C, H, W) uint8, or finite floats.
        labels: (N,) int64 in [0, number of classes), or (N, classes) zeros and ones.
    """

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "ImageSet":
        """Return the set on a device; the same object if it is already there."""
        return ImageSet(self.images.to(device), self.labels.to(device))


def check_image_set(data: ImageSet, num_classes: int, name: str) -> None:
    """Check that a set can be used for training and evaluation.

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
    if labels.ndim == 2 and (labels.shape[1] != num_classes or not ((labels == 0) | (labels == 1)).all()):
        raise ValueError(
            f"{name}: labels {tuple(labels.shape)} up to {int(labels.max())} are not zeros and ones of {num_classes} "
            "classes: give a column for each, 1 where the image has it."
        )
    outside = (labels < 0) | (labels >= num_classes) if labels.ndim == 1 else torch.zeros(1, dtype=torch.bool)
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


class InMemory:
    """Keep a training and an evaluation set on the trainer's device and make loaders over them.

    Args:
        train: training images and labels.
        val: evaluation images and labels.
        batch_size: images per batch and process, in training and evaluation.
        augmentation: augmentation of training images.
        seed: seed of order and augmentation.
        mean: one value per channel; None computes it from the training set.
        std: one value per channel; None computes it from the training set.
        labels: False: nothing learns from the labels, which serve to measure representations: evaluation batches
            include the training images, not augmented, as the bank of the probe.
    """

    def __init__(
        self,
        train: ImageSet,
        val: ImageSet,
        *,
        batch_size: int,
        augmentation: Augmentation,
        seed: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        labels: bool = True,
    ) -> None:
        self.train = train
        self.labels = labels
        self.val = val
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.seed = seed
        computed_mean, computed_std = (mean, std) if mean and std else channel_statistics(train.images)
        self.mean = tuple(mean or computed_mean)
        self.std = tuple(std or computed_std)

    def train_loader(self, trainer: Trainer | None, start_batch: int = 0) -> DeviceLoader:
        """Return shuffled, augmented batches of the training set; the first epoch begins at `start_batch`."""
        place = placement(trainer)
        self.train = self.train.to(place.device)
        return DeviceLoader(
            *self.train,
            batch_size=self.batch_size,
            mean=self.mean,
            std=self.std,
            augmentation=self.augmentation,
            seed=self.seed,
            shuffle=True,
            rank=place.rank,
            world_size=place.world_size,
            start_batch=start_batch,
        )

    def val_loader(self, trainer: Trainer | None) -> Any:
        """Return the batches of the evaluation set, in order, every image exactly once over all ranks."""
        self.val = self.val.to(placement(trainer).device)
        if self.labels:
            return self._evaluation(self.val, trainer)
        self.train = self.train.to(placement(trainer).device)
        return InTurn(
            [(part, self._evaluation(one, trainer)) for part, one in ((HELD_OUT, self.val), (BANK, self.train))]
        )

    def _evaluation(self, images: ImageSet, trainer: Trainer | None) -> DeviceLoader:
        place = placement(trainer)
        return DeviceLoader(
            *images,
            batch_size=self.batch_size,
            mean=self.mean,
            std=self.std,
            rank=place.rank,
            world_size=place.world_size,
        )

    def test_loader(self, trainer: Trainer | None) -> Any:
        """Return the same as `val_loader`."""
        return self.val_loader(trainer)

    def example(self) -> Tensor:
        """Return two normalised training images, (2, C, H, W) float32 on the CPU, to find feature shapes."""
        two = ImageSet(self.train.images[[0, -1]], self.train.labels[[0, -1]]).to(placement(None).device)
        images, _, _ = next(iter(DeviceLoader(*two, batch_size=2, mean=self.mean, std=self.std)))
        return images


class InMemoryData(ImageData):
    """A data module over a training and an evaluation set in memory; its subclasses read them.

    Args:
        memory: both sets, with what is done to them.
        classes: names of the K classes.
    """

    def __init__(self, memory: InMemory, classes: Sequence[str]) -> None:
        height, width = memory.train.images.shape[-2:]
        super().__init__(
            memory, classes, image_size=(height, width), mean=memory.mean, std=memory.std, labels=memory.labels
        )
        self.pixel_unit = pixel_unit(memory.train.images)
        self.augmentation, self.batch_size = memory.augmentation, memory.batch_size
        self.seed, self.labels = memory.seed, memory.labels
