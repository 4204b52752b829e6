"""One image file to RGB, whatever its kind: upright, 8 bits, nothing clipped, and a clear error if it is broken."""

import os
from typing import NamedTuple

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow finds an orientation in the head of a PNG; to look for more, it would decode the pixels.
_TOLD_BY_PNG = ("exif", "Raw profile type exif", "XML:com.adobe.xmp")
# How the message about a broken image ends; it is no advice where such images are left out already.
MEND = '; replace or remove it, or set on_bad_image="skip" to leave such images out.'


class Header(NamedTuple):
    """Hold what the head of an image file says.

    Args:
        size: (height, width) in pixels, once the picture is upright.
        stored: (height, width) as stored.
    """

    size: tuple[int, int]
    stored: tuple[int, int]


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as 8-bit RGB.

    The EXIF orientation is applied, unless the EXIF is damaged. Grey images are repeated over the channels; 16-bit ones
    are scaled (65535 becomes 255); palettes and CMYK are converted; transparency is dropped and the colours below it
    are kept, as torchvision does. Of several frames the first is taken.

    Args:
        path: the file.

    Returns:
        The image in mode RGB.

    Raises:
        ValueError: if the file cannot be read, is corrupt or truncated, holds floats, or states more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels (a decompression bomb); names the file and the mend.
    """
    try:
        with Image.open(path) as image:
            header_of(image)
            return _to_rgb(upright(image))
    except Exception as error:  # Pillow's readers raise almost anything on a corrupt file
        raise _unreadable(path, error) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels reach from {values.min()} to {values.max()}; save it with 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # PIL warns when it drops the transparency of a palette in one step
    return image.convert("RGB")


def header_of(image: Image.Image) -> Header:
    """Return the sizes of an opened image that is not decoded yet; raise ValueError if it has too many pixels."""
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels exceed PIL.Image.MAX_IMAGE_PIXELS")
    stored = image.height, image.width
    seen = image.format != "PNG" or any(key in image.info for key in _TOLD_BY_PNG)
    turned = seen and _orientation(image) in (5, 6, 7, 8)
    if turned and image.format == "TIFF":  # Pillow has swapped the sides of these already
        return Header(stored, stored[::-1])
    return Header(stored[::-1] if turned else stored, stored)


def upright(image: Image.Image) -> Image.Image:
    """Return an opened image decoded and turned as its EXIF says; as it is stored if the EXIF is damaged."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the height and width that `read_rgb` gives an image, from the head of its file.

    Raises:
        ValueError: if the head cannot be read, or states too many pixels; names the file and the mend.
    """
    try:
        with Image.open(path) as image:
            return header_of(image).size
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above; the pixels may be fine
        return 1
    return orientation


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(f"image {os.fspath(path)} cannot be read ({type(error).__name__}: {error}){MEND}")
