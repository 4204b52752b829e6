"""Any labelled images that fit in memory, from two `.npz` files."""

import os

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffkd.data.absent_classes import absent_classes
from diffkd.data.augmentation import Augmentation
from diffkd.data.image_data import ImageData
from diffkd.data.image_set import check_image_set
from diffkd.data.in_memory import InMemory
from diffkd.data.npz import Layout, read_npz
from diffkd.data.quoting import quoted

NO_AUGMENTATION = Augmentation()
_MOST_CLASSES = 1_000_000  # labels beyond are numbers of something else, and so many names could fill the memory


class Arrays(ImageData):
    """Serve images and labels of two `.npz` files from memory.

    Both files are read and checked when the module is made, so that bad ones are found before training.

    Args:
        train: file of the training set with the keys `images`, (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float;
            `labels`, (N,) integers from 0; and optionally `classes`, the names of the classes.
        test: file of the evaluation set, likewise.
        batch_size: images per batch and process.
        augmentation: what is done to training images.
        seed: seed of order and augmentation.
        mean: one value per channel, in units of [0, 1] for uint8 images and in their own for floats; None computes it
            from the training set.
        std: one value per channel, likewise.
        layout: where the channels are; "auto" finds 1 or 3 channels.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, a key is missing, a label is out of range, a value is not finite, or the two
            files do not fit together; names the file and the first bad index.
    """

    def __init__(
        self,
        train: str | os.PathLike[str],
        test: str | os.PathLike[str],
        batch_size: int = 128,
        augmentation: Augmentation = NO_AUGMENTATION,
        seed: int = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        layout: Layout = "auto",
    ) -> None:
        train_set, classes = read_npz(train, layout)
        test_set, test_classes = read_npz(test, layout)
        if classes is None:
            classes = test_classes or _counted(train_set.labels, train)
        elif test_classes not in (None, classes):
            raise ValueError(f"{test}: its classes {test_classes} are not those of {train}, {classes}; write the same.")
        check_image_set(train_set, len(classes), os.fspath(train))
        check_image_set(test_set, len(classes), os.fspath(test))
        unseen = absent_classes(train_set.labels.tolist(), classes)
        if unseen:
            rank_zero_warn(
                f"{train}: no image of class(es) {quoted(unseen)}, which cannot be learned; number the classes "
                "from 0 without gaps, or add images."
            )
        shape, test_shape = tuple(train_set.images.shape[1:]), tuple(test_set.images.shape[1:])
        if shape != test_shape or train_set.images.dtype != test_set.images.dtype:
            raise ValueError(
                f"{test}: images are {test_set.images.dtype} {test_shape} (C, H, W), those of {train} are "
                f"{train_set.images.dtype} {shape}; write both alike."
            )
        memory = InMemory(
            train_set, test_set, batch_size=batch_size, augmentation=augmentation, seed=seed, mean=mean, std=std
        )
        super().__init__(memory, classes, image_size=(shape[1], shape[2]), mean=memory.mean, std=memory.std)
        self.augmentation = augmentation
        self.batch_size, self.seed = batch_size, seed
        self.train, self.test, self.layout = os.fspath(train), os.fspath(test), layout


def _counted(labels: Tensor, source: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the numbers of the classes as their names, where nothing names them."""
    count = int(labels.max()) + 1 if len(labels) else 1
    if count > _MOST_CLASSES:
        raise ValueError(f"{source}: label {count - 1} makes {count} classes; number the classes from 0 without gaps.")
    return tuple(map(str, range(count)))
