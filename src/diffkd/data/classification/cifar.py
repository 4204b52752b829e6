"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images, 32x32 in colour."""

from pathlib import Path
from typing import Literal

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from diffkd.data.classification.augmentation import Augmentation
from diffkd.data.classification.in_memory import ImageSet, InMemory, InMemoryData, check_image_set
from diffkd.data.image_data import train_or_val

# Computed from the 50,000 training images of each, in units of [0, 1].
_STATISTICS = {
    10: ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)),
    100: ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
}
CROP_AND_FLIP = Augmentation(crop_padding=4, flip=True)


class Cifar(InMemoryData):
    """Serve CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) from memory, read by torchvision.

    The archives are pickles; torchvision opens them only if their MD5 sums are the official ones. Evaluation is on the
    official test set.

    Args:
        root: folder that holds `cifar-10-batches-py` or `cifar-100-python`.
        classes: 10 for CIFAR-10, 100 for CIFAR-100.
        batch_size: images per batch and process.
        augmentation: augmentation of training images; the default is the usual one.
        seed: seed of order and augmentation.
        download: fetch the official archive into `root` first, if it is not there.
        mean: three values, in units of [0, 1]; None uses the values of the training set.
        std: three values, likewise.
        labels: False: distil representations without the labels, which then serve to measure them.

    Raises:
        FileNotFoundError: if the data are missing or not the official ones; the message says how to get them.
    """

    def __init__(
        self,
        root: str | Path = "data",
        classes: Literal[10, 100] = 100,
        batch_size: int = 64,
        augmentation: Augmentation = CROP_AND_FLIP,
        seed: int = 0,
        download: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        labels: bool = True,
    ) -> None:
        train, trains = train_or_val(
            lambda: _read(root, classes, True, download), lambda: _read(root, classes, False, False, alone=True)
        )
        test = _read(root, classes, False, download) if trains else train
        default_mean, default_std = _STATISTICS[classes]
        memory = InMemory(
            _image_set(train),
            _image_set(test),
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            mean=mean or default_mean,
            std=std or default_std,
            labels=labels,
        )
        super().__init__(memory, train.classes)
        # The argument is a number; the attribute holds the names.
        self.save_hyperparameters("classes", logger=False)
        self.root, self.download = root, download


def _read(root: str | Path, classes: int, train: bool, download: bool, alone: bool = False) -> CIFAR10:
    """Read the training or test images; `alone`: where there are no training images."""
    dataset: type[CIFAR10] = CIFAR10 if classes == 10 else CIFAR100
    if alone:
        dataset = type(dataset.__name__, (dataset,), {"train_list": []})
    try:
        return dataset(root, train=train, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"CIFAR-{classes} is not in {root}, or is not the official one ({error}); "
            f"put {dataset.base_folder} there or set download=True."
        ) from error


def _image_set(dataset: CIFAR10) -> ImageSet:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (N, 32, 32, 3) to (N, 3, 32, 32)
    data = ImageSet(images, torch.tensor(dataset.targets))
    check_image_set(data, len(dataset.classes), dataset.root)
    return data
