"""The data set inside the package: the first images of every class of Fashion-MNIST, enough for a demo."""

import io
from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from diffkd.data.augmentation import Augmentation
from diffkd.data.device_loader import DeviceLoader
from diffkd.data.fashion_mnist import CLASSES, CROP_AND_FLIP, MEAN, STD
from diffkd.data.image_set import ImageSet
from diffkd.data.in_memory import InMemory


class FashionSubset(LightningDataModule):
    """Serve a fixed, class-balanced subset of Fashion-MNIST that comes with the package.

    It holds the first 800 training and the first 200 test images of each class, in their official order and bit-exact,
    taken from the official training and test sets (`scripts/make_fashion_subset.py` made it). It is normalised with
    the statistics of the full set, so that models trained on either fit both.

    Args:
        batch_size: images per batch and process.
        augmentation: what is done to training images.
        seed: seed of order and augmentation.
        mean: one value, in units of [0, 1].
        std: one value, likewise.
    """

    def __init__(
        self,
        batch_size: int = 128,
        augmentation: Augmentation = CROP_AND_FLIP,
        seed: int = 0,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        super().__init__()
        train, test = read_fashion_subset()
        self._memory = InMemory(
            train, test, batch_size=batch_size, augmentation=augmentation, seed=seed, mean=mean, std=std
        )
        self.classes = CLASSES
        self.num_classes = len(CLASSES)
        self.in_channels = 1
        self.image_size = (28, 28)
        self.mean, self.std = self._memory.mean, self._memory.std
        self.augmentation = augmentation
        self.batch_size, self.seed = batch_size, seed
        self.start_batch = 0

    def train_dataloader(self) -> DeviceLoader:
        """Return shuffled, augmented training batches; the first epoch begins at `start_batch`."""
        return self._memory.train_loader(self.trainer, self.start_batch)

    def val_dataloader(self) -> DeviceLoader:
        """Return the batches of the test part, each image exactly once."""
        return self._memory.val_loader(self.trainer)

    def test_dataloader(self) -> DeviceLoader:
        """Return the same as `val_dataloader`."""
        return self.val_dataloader()

    def example(self) -> Tensor:
        """Return two normalised training images, (2, 1, 28, 28) float32 on the CPU."""
        return self._memory.example()


def read_fashion_subset() -> tuple[ImageSet, ImageSet]:
    """Read the training and the test part: (N, 1, 28, 28) uint8 images and (N,) int64 labels each."""
    return read_fashion_part("train"), read_fashion_part("test")


def read_fashion_part(part: Literal["train", "test"]) -> ImageSet:
    """Read one part: (N, 1, 28, 28) uint8 images and (N,) int64 labels."""
    content = files("diffkd").joinpath("assets", "fashion_mnist", "subset.npz").read_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return ImageSet(
            torch.from_numpy(arrays[f"{part}_images"])[:, None], torch.from_numpy(arrays[f"{part}_labels"]).long()
        )
