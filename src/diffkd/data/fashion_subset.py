"""The data set inside the package: the first images of every class of Fashion-MNIST, enough for a demo."""

import io
from importlib.resources import files
from typing import Literal

import numpy as np
import torch

from diffkd.data.augmentation import Augmentation
from diffkd.data.fashion_mnist import CLASSES, CROP_AND_FLIP, MEAN, STD
from diffkd.data.image_data import ImageData
from diffkd.data.image_set import ImageSet
from diffkd.data.in_memory import InMemory


class FashionSubset(ImageData):
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
        train, test = read_fashion_subset()
        memory = InMemory(train, test, batch_size=batch_size, augmentation=augmentation, seed=seed, mean=mean, std=std)
        super().__init__(memory, CLASSES, image_size=(28, 28), mean=memory.mean, std=memory.std)
        self.augmentation = augmentation
        self.batch_size, self.seed = batch_size, seed


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
