"""Images and masks in folders, the usual layout of custom segmentation data."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffkd.data.folders import evaluation_split, read_text
from diffkd.data.segmentation.masks import MOST_IDS, MaskCode
from diffkd.data.segmentation.pairs import Pairs, scan_pairs
from diffkd.data.segmentation.segmentation_data import SCALE_AND_FLIP, SegmentationData, Split
from diffkd.data.segmentation.transform import SegmentationAugmentation

Color = tuple[int, int, int]
_COLOR = r"(?P<red>\d+)[\s,;]+(?P<green>\d+)[\s,;]+(?P<blue>\d+)"
_NAME_FIRST = re.compile(rf"(?P<name>.*?\S)[\s,;:]+{_COLOR}(?:[\s,;:]*|:.*)")
_COLOR_FIRST = re.compile(rf"{_COLOR}[\s,;:]+(?P<name>\S.*)")


def class_names(classes: str | Path | Sequence[str], root: Path) -> tuple[str, ...]:
    """Return the class names in the order of their ids.

    Args:
        classes: the names, or a text file with one name per line; a relative path is searched in `root` first. Trailing
            empty lines are ignored.
        root: the folder of the data.

    Returns:
        The names.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if there are none, one is empty, two are equal, or they are more than the ids of 16 bits.
    """
    if isinstance(classes, (str, Path)):
        path = _file(classes, root, "classes")
        source, names = str(path), [line.strip() for line in read_text(path).rstrip().splitlines()]
        kind = path.suffix.lower()
        if names and (kind in (".json", ".yaml", ".yml") or (kind == ".csv" and "," in names[0])):
            raise ValueError(f"{source}: no plain list, it begins with {names[0]!r}; give a file with one name a line.")
    else:
        source, names = "classes", [str(name) for name in classes]
    if len(names) > MOST_IDS:
        raise ValueError(f"{source}: {len(names):,} classes, but masks have ids of 16 bits: give at most {MOST_IDS:,}.")
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if not name:
            raise ValueError(f"{source}: the name of class {index} is empty; give one name for each id, from 0 on.")
        if first.setdefault(name, index) != index:
            raise ValueError(f"{source}: class {name!r} is listed twice, as {first[name]} and {index}.")
    if not names:
        raise ValueError(f"{source}: no classes; give one name for each id, from 0 on.")
    return tuple(names)


def class_colors(colors: str | Path | Mapping[str, Sequence[int]], root: Path) -> dict[str, Color]:
    """Return the colour of each class, for masks that store colours.

    Args:
        colors: name to (red, green, blue), 0 to 255; or a file: JSON with such a mapping, or text with one class per
            line, `name, red, green, blue` or `red green blue name`, separated by commas, semicolons, colons or blanks.
            Lines that begin with # and a header line are ignored, as are the parts that CVAT's `labelmap.txt` has after
            a colon.
        root: the data folder, where a relative path is searched first.

    Returns:
        Mapping from name to colour, in the given order.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it cannot be parsed, or a colour is out of range; the message names the line.
    """
    if isinstance(colors, Mapping):
        return _checked(list(colors.items()), "colors")
    path = _file(colors, root, "colors")
    text = read_text(path)
    if path.suffix.lower() != ".json":
        return _checked(_lines(text, path), str(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); give {{name: [red, green, blue], ...}}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping; give {{name: [red, green, blue], ...}}.")
    return _checked(list(content.items()), str(path))


def _file(given: str | Path, root: Path, what: str) -> Path:
    for path in (root / given, Path(given)):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{what}: no file {given}, neither in {root} nor here; give its path, or a list in code.")


def _lines(text: str, path: Path) -> list[tuple[str, Sequence[Any]]]:
    found: list[tuple[str, Sequence[Any]]] = []
    lines = [line.strip() for line in text.splitlines()]
    first = next((number for number, line in enumerate(lines) if line and not line.startswith("#")), 0)
    for number, line in enumerate(lines):
        if not line or line.startswith("#"):
            continue
        match = _NAME_FIRST.fullmatch(line) or _COLOR_FIRST.fullmatch(line)
        if match:
            found.append((match["name"].strip("\"' "), [int(match[channel]) for channel in ("red", "green", "blue")]))
        elif number != first:
            raise ValueError(f"{path}, line {number + 1}: {line!r} is not a name and a colour: red, green, blue.")
    return found


def _checked(colors: list[tuple[str, Sequence[Any]]], source: str) -> dict[str, Color]:
    found: dict[str, Color] = {}
    for name, color in colors:
        good = isinstance(color, (list, tuple)) and len(color) == 3
        if not good or not all(type(value) is int and 0 <= value <= 255 for value in color):
            raise ValueError(f"{source}: the colour of {name!r} is {color!r}; give red, green, blue from 0 to 255.")
        if name in found:
            raise ValueError(f"{source}: class {name!r} is listed twice.")
        found[name] = (color[0], color[1], color[2])
    if not found:
        raise ValueError(f"{source}: no colours; give a name with red, green and blue for each class.")
    return found


def ids_and_colors(table: dict[str, Color], classes: tuple[str, ...], ignore_index: int) -> list[tuple[int, Color]]:
    """Return pairs of class id and colour for `MaskCode`; colours of other names are ignored."""
    missing = [name for name in classes if name not in table]
    if missing:
        raise ValueError(f"colors: none for {', '.join(map(repr, missing[:5]))}; give a colour for each class.")
    ids = {name: index for index, name in enumerate(classes)}
    return [(ids.get(name, ignore_index), color) for name, color in table.items()]


class MaskFolder(SegmentationData):
    """Serve images and masks from `root/train/images/`, `root/train/masks/` and the same below `root/val/`.

    Image and mask are matched by their paths below these folders, without suffix and extension. Files are listed and
    their sizes compared when the module is created. Masks are PNG: grey (up to 16 bits) or palette images of class ids,
    or colour images with a table of colours. Training images are augmented and cropped to `crop_size`; evaluation
    images are not cropped, and a batch contains only images of one size.

    Batches are images (B, 3, H, W) float32 normalised, masks (B, H, W) int64 of class ids in [0, K) or `ignore_index`,
    and indices (B,) int64.

    Args:
        root: the folder.
        batch_size: training images per batch and process.
        augmentation: augmentation of training images besides the random crop.
        seed: seed of order and augmentation.
        classes: names of the classes in the order of their ids, or a text file with one name per line, searched in
            `root` first. The last name may be that of `ignore_index`; it is not a class.
        num_classes: K; None uses the number of names or colours. Without names, class 3 is named "class 3".
        ignore_index: the id of pixels ignored in training and evaluation: outside of the class ids, or 0, which then
            stays a class without pixels.
        id_map: mapping from stored id to class id; pixels of all other ids are ignored.
        colors: for colour masks: class name to (red, green, blue), or a file with this mapping (`class_colors`). Names
            that are not in `classes` are ignored; without `classes`, the order of the colours gives the ids.
        unknown_colors: "error" raises for a mask with a colour that is not in `colors`, "ignore" ignores its pixels.
        train: the training split.
        val: the evaluation split; None uses "val", or else "valid", "validation" or "test".
        images: folder of a split's images; "{split}" is replaced by the split, as in "images/{split}". Without it the
            folder is inside the split's folder.
        masks: folder of a split's masks, likewise.
        image_suffix: suffix of image names after the part shared with the mask, with or without the extension; other
            files are ignored.
        mask_suffix: suffix of mask names, likewise, such as "_mask".
        **options: the other arguments of `SegmentationData`, such as `crop_size` and `num_workers`.

    Attributes:
        skipped: one message per pair left out.

    Raises:
        FileNotFoundError: if a folder or file is missing.
        ValueError: if a file has no partner, sizes differ, a mask is not of the expected kind, a link leaves the root,
            or a value is out of range; while iterating, if a file is broken or a mask contains an id of no class.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 8,
        augmentation: SegmentationAugmentation = SCALE_AND_FLIP,
        seed: int = 0,
        classes: str | Path | Sequence[str] | None = None,
        num_classes: int | None = None,
        ignore_index: int = 255,
        id_map: Mapping[int, int] | None = None,
        colors: str | Path | Mapping[str, Sequence[int]] | None = None,
        unknown_colors: Literal["error", "ignore"] = "error",
        train: str = "train",
        val: str | None = None,
        images: str = "images",
        masks: str = "masks",
        image_suffix: str = "",
        mask_suffix: str = "",
        **options: Any,
    ) -> None:
        top = Path(root)
        if not top.is_dir():
            raise FileNotFoundError(f"{top}: no such folder; give a root with {train}/{images} and {train}/{masks}.")
        table = None if colors is None else class_colors(colors, top)
        names = class_names(classes, top) if classes is not None else tuple(table) if table else None
        counted = _evaluated_classes(names, num_classes, ignore_index)
        coded = None if table is None else ids_and_colors(table, counted, ignore_index)
        id_map = None if id_map is None else {int(stored): int(id_) for stored, id_ in id_map.items()}
        code = MaskCode(len(counted), ignore_index, id_map=id_map, colors=coded, unknown_colors=unknown_colors)

        if val is None:
            val = evaluation_split(top, split_folder(images, "{split}"))
            alone = "{split}" not in images and not any((top / one).exists() for one in (train, val))
            if alone and (top / images).is_dir():
                val = "."  # evaluation images alone
        splits = {"train": train, "val": val}

        def read(split: Split, skip_bad: bool) -> Pairs:
            folders = [split_folder(name, splits[split]) for name in (images, masks)]
            return scan_pairs(
                top,
                *folders,
                image_suffix=image_suffix,
                mask_suffix=mask_suffix,
                colors=code.holds_colors,
                skip_bad=skip_bad,
            )

        super().__init__(
            read,
            code,
            counted,
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            **options,
        )
        self.root, self.train, self.val = root, train, val
        self.images, self.masks, self.id_map = images, masks, id_map
        self.image_suffix, self.mask_suffix = image_suffix, mask_suffix
        self.colors, self.unknown_colors = table, unknown_colors


def split_folder(name: str, split: str) -> str:
    """Return the folder of a split's images or masks below the root, by its argument.

    >>> split_folder("images", "val"), split_folder("images/{split}", "val")
    ('val/images', 'images/val')
    """
    return name.replace("{split}", split) if "{split}" in name else f"{split}/{name}"


def _evaluated_classes(names: tuple[str, ...] | None, num_classes: int | None, ignore_index: int) -> tuple[str, ...]:
    """Return the names of the classes, without a last name that belongs to the ignored id."""
    if names is None:
        if num_classes is None:
            raise ValueError("nothing says which classes there are: give classes, num_classes or colors.")
        if not 1 <= num_classes <= MOST_IDS:
            raise ValueError(f"num_classes={num_classes}: give 1 to {MOST_IDS:,}, as masks have ids of 16 bits.")
        names = tuple(f"class {index}" for index in range(num_classes))
        last_is_ignored = False
    else:
        last_is_ignored = ignore_index == len(names) - 1
        if num_classes is not None and num_classes not in (len(names), len(names) - last_is_ignored):
            raise ValueError(
                f"num_classes={num_classes}, but there are {len(names)} names of classes; leave num_classes out."
            )
    names = names[:-1] if last_is_ignored else names
    if not names:
        raise ValueError(f"the only class, {ignore_index}, is ignored: give more classes or another ignore_index.")
    if 0 < ignore_index < len(names):
        raise ValueError(
            f"ignore_index={ignore_index} is one of the {len(names)} classes; give num_classes without it, an id that "
            "is no class, such as 65535 or -100, or an id_map that leaves the ignored id out."
        )
    return names
