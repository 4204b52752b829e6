"""Reading of mask files: from stored ids or colours to class ids."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffkd.data.images import WHITE, Header, header_of, read_rgb, upright, with_open_image

_LOSSY = ("jpeg", "tiff_jpeg", "webp")  # lossy compressions of a TIFF
_LOSSLESS = ("PNG", "BMP", "GIF", "TIFF", "PPM")
_IDS = ("1", "L", "P", "I;16", "I;16B", "I")
MOST_IDS = 1 << 16  # of 16 bits, the most that a file of ids may hold
_COLOURS = ("1", "L", "P", "RGB", "RGBA")


def image_header(path: str | os.PathLike[str]) -> Header:
    """Read the size of an image without decoding it; raise ValueError, naming the file, if that fails."""
    try:
        return with_open_image(path, header_of)
    except Exception as error:  # Pillow's readers raise almost anything on a corrupt file
        raise ValueError(f"image {path} {_unreadable(error)}; replace it, or remove it and its mask.") from error


def mask_header(path: str | os.PathLike[str], *, colours: bool) -> Header:
    """Read the size of a mask without decoding it.

    Args:
        path: the file.
        colours: whether the mask stores colours instead of class ids.

    Returns:
        Its size.

    Raises:
        ValueError: if the file is not a lossless PNG, BMP, GIF, TIFF or PGM, cannot be read, or stores colours where
            ids are expected or vice versa; the message names the file and the fix.
    """
    try:
        kind, mode, header, lossy = with_open_image(path, _mask_facts)
    except Exception as error:
        raise ValueError(f"mask {path} {_unreadable(error)}; replace it, or remove it and its image.") from error
    if lossy or kind not in _LOSSLESS:
        why = ", whose compression changes ids" if lossy else ""
        raise ValueError(f"mask {path} is a {kind} file{why}; save masks as PNG.")
    if mode not in (_COLOURS if colours else _IDS):
        mend = (
            "take the table of colours away (colors=None) or save it as RGB"
            if colours
            else "give the colours of the classes (MaskFolder: colors=..., VocSegmentation: labelmap.txt in the root), "
            "or save it as grey or with a palette"
        )
        expected = "colours" if colours else "class ids"
        what, png = ("", "") if kind == "PNG" else (f"is a {kind} file and ", "; or save masks as PNG")
        raise ValueError(f"mask {path} {what}holds pixels of mode {mode} where {expected} are expected; {mend}{png}.")
    return header


def _mask_facts(image: Image.Image) -> tuple[str | None, str, Header, bool]:
    """Return format, mode and sizes of a mask, and whether its compression is lossy."""
    lossy = image.format in ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000") or image.info.get("compression") in _LOSSY
    return image.format, image.mode, header_of(image), lossy


def read_mask(path: str | os.PathLike[str], *, colours: bool = False) -> npt.NDArray[Any]:
    """Read the class ids of a mask, or its colours.

    Ids are the grey values of a file with 1, 2, 4, 8 or 16 bits, or the indices into its palette, as stored; nothing is
    scaled. Colours are those of an RGB image or of the palette; transparency is dropped. Interlaced files are
    supported. The EXIF orientation is applied, as for images. Checksums are verified, since a wrong bit is a wrong
    class.

    Args:
        path: the file.
        colours: whether the mask stores colours instead of class ids.

    Returns:
        Ids (H, W) uint8 or uint16; or colours (H, W, 3) uint8.

    Raises:
        ValueError: as `mask_header`, and if the file is truncated or corrupt.
    """
    mask_header(path, colours=colours)
    try:
        content = Path(path).read_bytes()
        is_png = content.startswith(b"\x89PNG")
        if is_png:
            with_open_image(content, methodcaller("verify"))
        pixels = with_open_image(content, partial(_mask_pixels, colours=colours))
    except Exception as error:
        raise ValueError(f"mask {path} {_unreadable(error)}; replace it, or remove it and its image.") from error
    if colours:
        return pixels
    # Byte 24 of a PNG is the bit depth and byte 25 is 0 for grey. Pillow scales 2-bit and 4-bit grey to 0..255.
    if is_png and content[25] == 0 and content[24] in (2, 4):
        return pixels // np.uint8(255 // ((1 << content[24]) - 1))
    if pixels.dtype.itemsize > 1 and not 0 <= pixels.min() <= pixels.max() < MOST_IDS:
        raise ValueError(f"mask {path} holds ids from {pixels.min()} to {pixels.max()}; give ids of 16 bits.")
    return pixels.astype(np.uint16 if pixels.dtype.itemsize > 1 else np.uint8)


def _mask_pixels(image: Image.Image, colours: bool) -> npt.NDArray[Any]:
    turned = upright(image)
    if colours:
        return np.asarray(turned.convert("RGB"))
    if image.format == "GIF" and turned.mode == "P":
        table = np.array(turned.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        if (table == table[:, :1]).all():  # a grey image; GIF stores only the greys that occur
            greys: npt.NDArray[Any] = table[np.asarray(turned), 0]
            return greys
    return np.asarray(turned)


def read_image(path: str | os.PathLike[str], white: int = WHITE) -> npt.NDArray[np.uint8]:
    """Read an image as (H, W, 3) 8-bit RGB (`read_rgb`); raise ValueError, naming the file, if that fails."""
    try:
        return np.array(read_rgb(path, white))
    except ValueError as error:
        raise ValueError(
            f"image {path} {_unreadable(error.__cause__ or error)}; replace it, or remove it and its mask."
        ) from error


def _unreadable(error: BaseException) -> str:
    return f"cannot be read ({type(error).__name__}: {error})"


_UNKNOWN = -(1 << 31)  # neither a class nor a possible `ignore_index`


class MaskCode:
    """Maps mask files to class ids in [0, K) or the ignored id.

    Args:
        num_classes: K.
        ignore_index: the id of ignored pixels; any 32-bit integer except the lowest.
        id_map: stored id to class id or `ignore_index`; None uses ids unchanged.
        unmapped: whether stored ids missing in `id_map` are ignored or an error.
        colors: pairs of class id or `ignore_index` and (red, green, blue), for masks that store colours.
        unknown_colors: whether a colour of no class is an error or ignored.

    Raises:
        ValueError: if an id is out of range, two classes have one colour, or both `id_map` and `colors` are given.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        *,
        id_map: Mapping[int, int] | None = None,
        unmapped: Literal["ignore", "error"] = "ignore",
        colors: Sequence[tuple[int, tuple[int, int, int]]] | None = None,
        unknown_colors: Literal["error", "ignore"] = "error",
    ) -> None:
        if not 1 <= num_classes <= MOST_IDS:
            raise ValueError(f"num_classes={num_classes}: give 1 to {MOST_IDS:,}, as masks have ids of 16 bits.")
        if not _UNKNOWN < ignore_index < 1 << 31:
            raise ValueError(f"ignore_index={ignore_index} is no integer of 32 bits: give one such as 255 or -100.")
        if id_map is not None and colors is not None:
            raise ValueError("id_map is for masks of ids and colors for masks of colours: give one of them.")
        for name, value, choices in (
            ("unmapped", unmapped, ("ignore", "error")),
            ("unknown_colors", unknown_colors, ("error", "ignore")),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: give one of {', '.join(map(repr, choices))}.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.holds_colors = colors is not None
        self._mapped = id_map is not None
        self._unknown_color = ignore_index if unknown_colors == "ignore" else _UNKNOWN
        # One byte per pixel if possible, for masks that are cached in memory.
        small = 0 <= ignore_index < 256 and num_classes <= 256
        self.dtype: np.dtype[Any] = np.dtype(np.uint8 if small else np.int32)
        self._table = self._id_table(id_map, ignore_index if unmapped == "ignore" else _UNKNOWN)
        self._keys, self._values = self._color_table(colors or ())

    def read(self, path: str | os.PathLike[str]) -> npt.NDArray[Any]:
        """Read a mask file.

        Args:
            path: a PNG.

        Returns:
            (H, W) class ids and `ignore_index`, uint8 if they fit, otherwise int32.

        Raises:
            ValueError: if the file cannot be read, or contains an id or a colour without a class; the message names the
                file, the id or colour, the first such pixel and the fix.
        """
        stored = read_mask(path, colours=self.holds_colors)
        ids = self._of_colors(stored) if self.holds_colors else self._table[stored]
        unknown = ids == _UNKNOWN
        if unknown.any():
            row, column = (int(place) for place in np.argwhere(unknown)[0])
            raise ValueError(
                f"mask {path} {self._unknown_value_message(stored[row, column], row, column, int(unknown.sum()))}"
            )
        return ids.astype(self.dtype)

    def _id_table(self, id_map: Mapping[int, int] | None, otherwise: int) -> npt.NDArray[np.int32]:
        table = np.full(MOST_IDS, otherwise if id_map is not None else _UNKNOWN, dtype=np.int32)
        if id_map is None:
            table[: self.num_classes] = np.arange(min(self.num_classes, MOST_IDS))
            if 0 <= self.ignore_index < MOST_IDS:
                table[self.ignore_index] = self.ignore_index
            return table
        for stored, id_ in id_map.items():
            if not 0 <= stored < MOST_IDS:
                raise ValueError(f"id_map: {stored} is no id that a PNG holds: give 0 to {MOST_IDS - 1}.")
            if not (0 <= id_ < self.num_classes or id_ == self.ignore_index):
                raise ValueError(
                    f"id_map: {stored} becomes {id_}, which is out of range for {self.num_classes} classes: give 0 to "
                    f"{self.num_classes - 1}, or ignore_index {self.ignore_index}."
                )
            table[stored] = id_
        return table

    def _color_table(
        self, colors: Sequence[tuple[int, tuple[int, int, int]]]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        found: dict[int, int] = {}
        for id_, (red, green, blue) in colors:
            key = red << 16 | green << 8 | blue
            if found.setdefault(key, id_) != id_:
                raise ValueError(f"colors: ({red}, {green}, {blue}) stands for two classes, {found[key]} and {id_}.")
        keys = np.array(sorted(found), dtype=np.int32)
        return keys, np.array([found[key] for key in sorted(found)], dtype=np.int32)

    def _of_colors(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        red, green, blue = (stored[..., channel].astype(np.int32) for channel in range(3))
        keys = red << 16 | green << 8 | blue
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[places] == keys, self._values[places], np.int32(self._unknown_color))

    def _unknown_value_message(self, value: Any, row: int, column: int, count: int) -> str:
        where = f"at row {row}, column {column} ({count} such pixels)"
        if self.holds_colors:
            return (
                f"holds colour {tuple(int(part) for part in value)} {where}, which is of no class; add it to colors "
                'or labelmap.txt, or set unknown_colors="ignore" where the data have it.'
            )
        if self._mapped:
            return f"holds id {int(value)} {where}, which is of no class; mend it."
        return (
            f"holds id {int(value)} {where}, which is out of range for {self.num_classes} classes; ids count from 0 to "
            f"{self.num_classes - 1} and ignore_index is {self.ignore_index}: mend it, set num_classes or "
            "ignore_index, or give an id_map."
        )
