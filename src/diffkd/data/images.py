"""Reading of one image file as upright 8-bit RGB, and the check of many files before training."""

import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from diffkd.data.folders import FolderSamples, absent_classes, format_names
from diffkd.data.shards import TarMember

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
# Keys under which Pillow stores the orientation from a PNG's header; a further search would decode the pixels.
_PNG_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp")
# End of the message about a broken image; removed if such images are already skipped.
BAD_IMAGE_HINT = '; replace or remove it, or set on_bad_image="skip" to leave such images out.'


WHITE = 65535  # the value of 16-bit images that becomes 255
_T = TypeVar("_T")


class Header(NamedTuple):
    """Sizes from the header of an image file.

    Args:
        size: (height, width) in pixels after the EXIF orientation is applied.
        stored: (height, width) as stored.
    """

    size: tuple[int, int]
    stored: tuple[int, int]


def read_rgb(path: str | os.PathLike[str], white: int = WHITE) -> Image.Image:
    """Read an image file as 8-bit RGB.

    The EXIF orientation is applied, unless the EXIF is damaged. Grey images are repeated over the channels; 16-bit ones
    are scaled (`white` becomes 255); palettes and CMYK are converted; transparency is dropped and the colours below it
    are kept, as torchvision does. Only the first frame is read.

    Args:
        path: the file.
        white: the value of 16-bit images that becomes 255, as all above it do.

    Returns:
        The image in mode RGB.

    Raises:
        ValueError: if the file cannot be read, is corrupt or truncated, holds floats, or states more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels (a decompression bomb); the message names the file and the fix.
    """
    try:
        return with_open_image(path, partial(_decoded, white=white))
    except Exception as error:  # Pillow's readers raise almost anything on a corrupt file
        raise _unreadable(path, error) from error


def with_open_image(file: str | os.PathLike[str] | bytes, use: Callable[[Image.Image], _T]) -> _T:
    """Open an image and return `use(image)`; text chunks of a PNG that are too large for Pillow are removed first.

    Args:
        file: the image file, also one in a tar archive, or its content.
        use: function of the opened image, which is closed afterwards.
    """
    if isinstance(file, TarMember):
        file = file.read()
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return use(_checked(image))
    except ValueError as error:
        if "MAX_TEXT_" not in str(error):
            raise
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    with Image.open(io.BytesIO(b"".join(_without_texts(content)))) as image:
        return use(_checked(image))


# Formats of programs, for which Pillow starts an interpreter, whatever the name of the file.
_PROGRAMS = ("EPS", "WMF", "EMF")


def _checked(image: Image.Image) -> Image.Image:
    if image.format in _PROGRAMS:
        raise ValueError(f"it is {image.format}, a program that draws, which is not run; save it as PNG")
    return image


def _without_texts(png: bytes) -> Iterator[bytes]:
    """Yield a PNG without text chunks and colour profile; small text chunks with the orientation are kept."""
    yield png[:8]
    start = 8
    while start + 12 <= len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4])
        kind, content = png[start + 4 : start + 8], png[start + 8 : end - 4]
        if kind not in (b"iCCP", b"zTXt", b"iTXt", b"tEXt") or _has_orientation(kind, content):
            yield png[start:end]
        start = end


def _has_orientation(kind: bytes, content: bytes) -> bool:
    key, _, text = content.partition(b"\0")
    if key.decode("latin-1") not in _PNG_ORIENTATION_KEYS or kind == b"iCCP":
        return False
    compressed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    unpacking = zlib.decompressobj()
    try:
        # The language fields before the text of an iTXt chunk are not compressed.
        unpacked = unpacking.decompress(text[1:], _LARGEST_TEXT) if compressed and kind == b"zTXt" else text
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail and len(unpacked) < _LARGEST_TEXT and (kind != b"iTXt" or not compressed)


_LARGEST_TEXT = 1 << 16


def _decoded(image: Image.Image, white: int) -> Image.Image:
    header_of(image)
    return _to_rgb(upright(image), white)


def _to_rgb(image: Image.Image, white: int) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 or 16 bits")
    if _has_16_bits(image):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels reach from {values.min()} to {values.max()}; save it with 8 or 16 bits")
        image = Image.fromarray(((values.clip(max=white) * 255 + white // 2) // white).astype(np.uint8))
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # PIL warns when it drops the transparency of a palette in one step
    return image.convert("RGB")


def _has_16_bits(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def white_level(given: int | None, paths: Sequence[str]) -> int:
    """Return the value of 16-bit images that is mapped to 255; warn if all images would be nearly black.

    Args:
        given: the value, None for 65535.
        paths: the training images; a few are read if `given` is None.

    Raises:
        ValueError: if the value is out of range.
    """
    if given is not None:
        if not 0 < given <= WHITE:
            raise ValueError(f"white_level={given} is no value of 16 bits: give 1 to {WHITE}.")
        return given
    brightest = 0
    for path in paths[:: len(paths) // _LOOKED_AT + 1]:
        try:
            value = with_open_image(path, _brightest)
        except Exception:  # the later decoding reports what is wrong with the file
            continue
        if value is None or value > WHITE // 16:
            return WHITE
        brightest = max(brightest, value)
    if brightest:
        bits = max(8, brightest.bit_length())
        rank_zero_warn(
            f"{paths[0]} and others are 16-bit images whose values reach {brightest} of {WHITE} only, so that they are "
            f"nearly black; for pixels of {bits} bits set white_level={(1 << bits) - 1}, or white_level={WHITE} to "
            "leave them so."
        )
    return WHITE


_LOOKED_AT = 8


def _brightest(image: Image.Image) -> int | None:
    """Return the highest value of a 16-bit image, None for others."""
    if not _has_16_bits(image):
        return None
    header_of(image)
    return int(np.asarray(image).max())


def header_of(image: Image.Image) -> Header:
    """Return the sizes of an opened image without decoding it; raise ValueError if it has too many pixels."""
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels exceed PIL.Image.MAX_IMAGE_PIXELS")
    stored = image.height, image.width
    seen = image.format != "PNG" or any(key in image.info for key in _PNG_ORIENTATION_KEYS)
    turned = seen and _orientation(image) in (5, 6, 7, 8)
    if turned and image.format == "TIFF":  # Pillow has swapped the sides of these already
        return Header(stored, stored[::-1])
    return Header(stored[::-1] if turned else stored, stored)


def upright(image: Image.Image) -> Image.Image:
    """Decode an opened image and apply its EXIF orientation; a damaged EXIF is ignored."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the height and width of the image that `read_rgb` returns, from the file's header.

    Raises:
        ValueError: if the header cannot be read, or states too many pixels; the message names the file and the fix.
    """
    try:
        return with_open_image(path, header_of).size
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


class Orientation(NamedTuple):
    """The EXIF orientation of an image and its sizes.

    Args:
        orientation: EXIF orientation, 1 to 8; 1 is upright.
        header: the sizes.
    """

    orientation: int
    header: Header


def read_orientation(path: str | os.PathLike[str]) -> Orientation:
    """Return the orientation of an image file from its header; raise ValueError as `upright_size`."""
    try:
        return with_open_image(path, lambda image: Orientation(_orientation(image), header_of(image)))
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above; the pixels may be fine
        return 1
    return orientation


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(f"image {os.fspath(path)} cannot be read ({type(error).__name__}: {error}){BAD_IMAGE_HINT}")


class Verified(NamedTuple):
    """The samples that can be decoded, and one message for each that cannot."""

    samples: FolderSamples
    problems: list[str]


def verify_images(samples: FolderSamples, threads: int = 1) -> Verified:
    """Decode every image once and separate good from broken files.

    Args:
        samples: files and labels.
        threads: number of decoding threads; decoding releases the GIL.

    Returns:
        The good samples in their order, and the messages about broken files.
    """
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        problems = list(pool.map(_problem, samples.paths, chunksize=64))
    good = [index for index, problem in enumerate(problems) if problem is None]
    return Verified(
        FolderSamples([samples.paths[index] for index in good], [samples.labels[index] for index in good]),
        [problem for problem in problems if problem is not None],
    )


def check_readable(samples: FolderSamples) -> None:
    """Raise ValueError for the first file that is empty or not readable; quick, since nothing is decoded."""
    bad = [path for path in samples.paths if _is_empty(path)]
    if bad:
        raise ValueError(
            f"image {bad[0]} is empty or may not be read ({len(bad)} such files); replace or remove it, "
            'or set on_bad_image="skip" to leave such images out.'
        )


def _is_empty(path: str) -> bool:
    if isinstance(path, TarMember):
        return not path.size
    return not os.access(path, os.R_OK) or not Path(path).stat().st_size


def check_every_class(train: FolderSamples | None, val: FolderSamples, classes: Sequence[str]) -> None:
    """Warn of classes without evaluation images; raise ValueError if one has no training image or `val` is empty.

    Nothing is checked of training images, and of which classes are evaluated, if `train` is None.
    """
    empty = [] if train is None else absent_classes(train.labels, classes)
    if empty:
        raise ValueError(
            f"train: no readable image of class(es) {format_names(empty)} is left; add some or remove them."
        )
    if not val.paths:
        raise ValueError("val: no readable image is left; add some.")
    unmeasured = [] if train is None else absent_classes(val.labels, classes)
    if unmeasured:
        rank_zero_warn(
            f"val: no image of class(es) {format_names(unmeasured)}, of which accuracy will say nothing; add some, or "
            "remove them from train."
        )


def _problem(path: str) -> str | None:
    try:
        read_rgb(path)
    except ValueError as error:
        return str(error)
    return None


OnBadImage = Literal["error", "skip"]


def check_on_bad_image(value: str) -> None:
    """Raise ValueError if a value is not one of `OnBadImage`."""
    if value not in get_args(OnBadImage):
        raise ValueError(f"on_bad_image={value!r}: give 'error' or 'skip'.")
