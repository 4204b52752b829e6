"""Labelled images from two `.npz` files, kept in memory."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffkd.data.classification.augmentation import Augmentation
from diffkd.data.classification.in_memory import ImageSet, InMemory, InMemoryData, check_image_set
from diffkd.data.folders import absent_classes, format_names
from diffkd.data.image_data import evaluated_classes, train_or_val

Layout = Literal["auto", "NHWC", "NCHW"]


class LabelledArrays(NamedTuple):
    """The content of a file: images, labels and, if present, class names."""

    data: ImageSet
    classes: tuple[str, ...] | None


def read_npz(path: str | os.PathLike[str], layout: Layout = "auto") -> LabelledArrays:
    """Read images, labels and, if present, class names from a `.npz` file without unpickling anything.

    Args:
        path: the file. Its keys: `images` (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float; `labels` (N,)
            integers, or (N, K) zeros and ones where an image may have several classes; optional `classes` (K,) strings.
            One column, (N, 1), means (N,), as Keras and MedMNIST write it; unless `classes` names a single class, which
            each image then has or not.
        layout: position of the channel axis. "auto" uses the last axis if its length is 1 or 3, else the second if its
            length is.

    Returns:
        Images as (N, C, H, W) uint8 or float32, labels as int64, and the class names or None. `check_image_set` checks
        labels and pixel values, not this function.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or not a `.npz`, a key is missing, or a shape or type is wrong; names the
            file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .npz with the keys images and labels.")
    arrays = _read(path)
    images, labels = arrays["images"], arrays["labels"]
    if labels.ndim not in (1, 2) or labels.dtype.kind not in ("iub" if labels.ndim == 2 else "iu"):
        raise ValueError(
            f"{path}: labels are {labels.dtype} {labels.shape}; give integers of shape (N,), or zeros and ones of "
            "shape (N, K) where an image may have several of K classes."
        )
    names = _names(arrays, path)
    if labels.ndim == 2 and labels.shape[1] == 1 and (names is None or len(names) != 1):
        labels = labels[:, 0]
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(f"{path}: images are {images.dtype}; give uint8 in 0..255, or floats.")
    images = np.ascontiguousarray(_channels_first(images, layout, path))
    tensor = torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.float32))
    return LabelledArrays(ImageSet(tensor, torch.from_numpy(labels.astype(np.int64))), names)


def _names(arrays: dict[str, np.ndarray[Any, Any]], path: Path) -> tuple[str, ...] | None:
    names = arrays.get("classes")
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise ValueError(f"{path}: classes are {names.dtype} {names.shape}; give texts of shape (K,).")
    return tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names)


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of the known keys; other keys are not read."""
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            keys = list(file) if isinstance(file, np.lib.npyio.NpzFile) else ["a single array"]
            wanted = [key for key in keys if key in ("images", "labels", "classes")]
            if isinstance(file, np.lib.npyio.NpzFile) and file.zip is not None:
                check_unpacked(sum(int(entry.file_size) for entry in file.zip.infolist()), path)
            arrays: dict[str, np.ndarray[Any, Any]] = {key: file[key] for key in wanted}
        bare = [key for key in wanted if not isinstance(arrays[key], np.ndarray)]
        if bare:
            raise ValueError(f"{bare[0]} is no array of NumPy")
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, MemoryError, ValueError) as error:
        raise ValueError(
            f"{path}: damaged, or not plain arrays ({error}); copy it again, or save it with "
            "np.savez(path, images=..., labels=...), without objects."
        ) from error
    missing = [key for key in ("images", "labels") if key not in arrays]
    if missing:
        raise ValueError(f"{path}: no key {' or '.join(map(repr, missing))}, only {keys}; rename or add it.")
    return arrays


def check_unpacked(size: int, path: Path) -> None:
    """Raise ValueError if a compressed file claims far more content than images can be compressed to.

    Args:
        size: bytes of the content.
        path: the file.
    """
    if size > max(_LARGEST_RATIO * path.stat().st_size, 2**28):
        raise ValueError(
            f"{path} unpacks to {size / 2**20:,.0f} MiB, more than {_LARGEST_RATIO} times its size, as images never "
            "do; it is damaged or hostile: fetch it again"
        )


_LARGEST_RATIO = 200


def _channels_first(images: np.ndarray[Any, Any], layout: Layout, path: Path) -> np.ndarray[Any, Any]:
    """Return the images as (N, C, H, W)."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4:
        raise ValueError(f"{path}: images have shape {images.shape}; give (N, H, W), (N, H, W, C) or (N, C, H, W).")
    if layout == "auto":
        layout = "NHWC" if images.shape[3] in (1, 3) else "NCHW"
        if layout == "NCHW" and images.shape[1] not in (1, 3):
            raise ValueError(
                f"{path}: images {images.shape} have 1 or 3 channels neither last nor second; "
                "say where they are with layout NHWC or NCHW."
            )
    return images.transpose(0, 3, 1, 2) if layout == "NHWC" else images


NO_AUGMENTATION = Augmentation()
_MOST_CLASSES = 1_000_000  # larger labels are not class indices, and so many names could fill the memory


class Arrays(InMemoryData):
    """Serve images and labels of two `.npz` files from memory.

    Both files are read and checked when the module is created, before training. Floats are used as they are. Those in
    [0, 255] with values above 16 are taken for pixels, and the student for one of images, as are those in [0, 1]; with
    floats in another range, which no image file has, `diffkd predict` refuses the student.

    Args:
        train: file of the training set with the keys `images`, (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float;
            `labels`, (N,) or (N, 1) integers from 0, or (N, K) zeros and ones where an image may have several classes;
            and optionally `classes`, the names of the classes. A single name makes (N, 1) one class that each image
            has or not.
        test: file of the evaluation set, likewise.
        batch_size: images per batch and process.
        augmentation: augmentation of training images.
        seed: seed of order and augmentation.
        mean: one value per channel, in units of [0, 1] for uint8 images and in the images' unit for floats; None
            computes it from the training set.
        std: one value per channel, likewise.
        layout: position of the channel axis; "auto" finds an axis of 1 or 3 channels.
        labels: False: distil representations without the labels, which then serve to measure them.

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
        labels: bool = True,
    ) -> None:
        (train_set, classes), trains = train_or_val(lambda: read_npz(train, layout), lambda: read_npz(test, layout))
        test_set, test_classes = read_npz(test, layout)
        if classes is None:
            classes = test_classes or _numbered_classes(train_set.labels, train)
        if not trains:
            classes = evaluated_classes(classes)
        if trains and test_classes not in (None, classes):
            raise ValueError(f"{test}: its classes {test_classes} are not those of {train}, {classes}; write the same.")
        if len(classes) == 1 and 2 in (train_set.labels.ndim, test_set.labels.ndim):  # named in one of the files
            train_set, test_set = (
                one._replace(labels=one.labels.reshape(len(one.labels), -1)) for one in (train_set, test_set)
            )
        check_image_set(train_set, len(classes), os.fspath(train))
        check_image_set(test_set, len(classes), os.fspath(test))
        several = train_set.labels.ndim == 2
        present = train_set.labels.nonzero()[:, 1] if several else train_set.labels
        unseen = absent_classes(present.tolist(), classes) if trains else []
        if unseen:
            rank_zero_warn(
                f"{train}: no image of class(es) {format_names(unseen)}, which cannot be learned; number the classes "
                "from 0 without gaps, or add images."
            )
        if labels is False and several:
            raise ValueError(
                f"{train}: several classes an image do not serve to measure representations: give one label each."
            )
        shape, test_shape = tuple(train_set.images.shape[1:]), tuple(test_set.images.shape[1:])
        if shape != test_shape or train_set.images.dtype != test_set.images.dtype:
            raise ValueError(
                f"{test}: images are {test_set.images.dtype} {test_shape} (C, H, W), those of {train} are "
                f"{train_set.images.dtype} {shape}; write both alike."
            )
        memory = InMemory(
            train_set,
            test_set,
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            mean=mean,
            std=std,
            labels=labels,
        )
        super().__init__(memory, classes)
        self.multi_label = several and labels
        self.train, self.test, self.layout = os.fspath(train), os.fspath(test), layout


def _numbered_classes(labels: Tensor, source: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the class indices as class names, for data without names."""
    count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1 if len(labels) else 1
    if count > _MOST_CLASSES:
        raise ValueError(f"{source}: label {count - 1} makes {count} classes; number the classes from 0 without gaps.")
    return tuple(map(str, range(count)))
