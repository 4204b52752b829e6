"""Labelled images from a NumPy `.npz` file, with every way in which such a file can be wrong."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from diffkd.data.image_set import ImageSet

Layout = Literal["auto", "NHWC", "NCHW"]


class LabelledArrays(NamedTuple):
    """Hold what a file gave: images and labels, and the names of the classes if it has them."""

    data: ImageSet
    classes: tuple[str, ...] | None


def read_npz(path: str | os.PathLike[str], layout: Layout = "auto") -> LabelledArrays:
    """Read images, labels and, if present, class names from a `.npz` file; nothing in it can run code.

    Args:
        path: the file. Its keys: `images` (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float; `labels` (N,)
            integers; optional `classes` (K,) strings.
        layout: where the channels are. "auto" takes the last axis if it is 1 or 3 long, else the second if that is.

    Returns:
        Images as (N, C, H, W) uint8 or float32, labels as int64, and the class names or None. Labels and pixel values
        are not checked here but by `check_image_set`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or no `.npz`, a key is missing, or a shape or type is wrong; names the
            file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .npz with the keys images and labels.")
    arrays = _read(path)
    images, labels = arrays["images"], arrays["labels"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape}; give integers of shape (N,).")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(f"{path}: images are {images.dtype}; give uint8 in 0..255, or floats.")
    images = np.ascontiguousarray(_channels_first(images, layout, path))
    tensor = torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.float32))
    return LabelledArrays(ImageSet(tensor, torch.from_numpy(labels.astype(np.int64))), _names(arrays, path))


def _names(arrays: dict[str, np.ndarray[Any, Any]], path: Path) -> tuple[str, ...] | None:
    names = arrays.get("classes")
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise ValueError(f"{path}: classes are {names.dtype} {names.shape}; give texts of shape (K,).")
    return tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names)


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of the keys that matter; other keys may hold anything and are not touched."""
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            keys = list(file) if isinstance(file, np.lib.npyio.NpzFile) else ["a single array"]
            wanted = [key for key in keys if key in ("images", "labels", "classes")]
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
