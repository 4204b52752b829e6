"""One PNG of a segmentation mask to the numbers or colours it holds, exactly, and a clear error if that cannot be."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffkd.data.decode import Header, header_of, read_rgb, upright

_IDS = ("1", "L", "P", "I;16", "I")
_COLOURS = ("1", "L", "P", "RGB", "RGBA")


def image_header(path: str | os.PathLike[str]) -> Header:
    """Read the size of an image without decoding it; raise ValueError, naming the file, if that fails."""
    try:
        with Image.open(path) as image:
            return header_of(image)
    except Exception as error:  # Pillow's readers raise almost anything on a corrupt file
        raise ValueError(f"image {path} {_unreadable(error)}; replace it, or remove it and its mask.") from error


def mask_header(path: str | os.PathLike[str], *, colours: bool) -> Header:
    """Read the size of a mask without decoding it.

    Args:
        path: the file.
        colours: whether the mask holds colours instead of class ids.

    Returns:
        Its size.

    Raises:
        ValueError: if the file is not a PNG, cannot be read, or holds colours where ids are expected or the other way
            round; names the file and the mend.
    """
    try:
        with Image.open(path) as image:
            kind, mode, header = image.format, image.mode, header_of(image)
    except Exception as error:
        raise ValueError(f"mask {path} {_unreadable(error)}; replace it, or remove it and its image.") from error
    if kind != "PNG":
        lossy = ", whose compression changes ids" if kind in ("JPEG", "WEBP") else ""
        raise ValueError(f"mask {path} is a {kind} file{lossy}; save masks as PNG.")
    if mode not in (_COLOURS if colours else _IDS):
        mend = (
            "take the table of colours away (colors=None) or save it as RGB"
            if colours
            else "give the colours of the classes (colors=...) or save it as grey or with a palette"
        )
        expected = "colours" if colours else "class ids"
        raise ValueError(f"mask {path} holds pixels of mode {mode} where {expected} are expected; {mend}.")
    return header


def read_mask(path: str | os.PathLike[str], *, colours: bool = False) -> npt.NDArray[Any]:
    """Read the class ids of a mask, or its colours.

    Ids are the grey values of a PNG with 1, 2, 4, 8 or 16 bits, or the indices into its palette, as stored; nothing is
    scaled. Colours are those of an RGB image or of the palette; transparency is dropped. Interlaced files are read as
    any other. The orientation of EXIF is applied, as to images. Check sums are verified, for a wrong bit is a wrong
    class.

    Args:
        path: the file.
        colours: whether the mask holds colours instead of class ids.

    Returns:
        Ids (H, W) uint8 or uint16; or colours (H, W, 3) uint8.

    Raises:
        ValueError: as `mask_header`, and if the file is truncated or corrupt.
    """
    mask_header(path, colours=colours)
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
        with Image.open(io.BytesIO(content)) as image:
            turned = upright(image)
            pixels = np.asarray(turned.convert("RGB") if colours else turned)
    except Exception as error:
        raise ValueError(f"mask {path} {_unreadable(error)}; replace it, or remove it and its image.") from error
    if colours:
        return pixels
    # Byte 24 of a PNG is the number of bits and byte 25 is 0 for grey. Pillow spreads grey of 2 and 4 bits over 0..255.
    if content[25] == 0 and content[24] in (2, 4):
        return pixels // np.uint8(255 // ((1 << content[24]) - 1))
    return pixels.astype(np.uint16 if pixels.dtype.itemsize > 1 else np.uint8)


def read_image(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """Read an image as (H, W, 3) 8-bit RGB (`diffkd.data.decode`); raise ValueError, naming the file, if that fails."""
    try:
        return np.array(read_rgb(path))
    except ValueError as error:
        raise ValueError(
            f"image {path} {_unreadable(error.__cause__ or error)}; replace it, or remove it and its mask."
        ) from error


def _unreadable(error: BaseException) -> str:
    return f"cannot be read ({type(error).__name__}: {error})"
