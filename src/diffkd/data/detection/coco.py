"""Detection in COCO's JSON format (https://cocodataset.org/#format-data): reader and data module."""

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from unicodedata import normalize

from lightning.pytorch.utilities import rank_zero_warn

from diffkd.data.detection.annotated_files import (
    AnnotatedFiles,
    ReadBox,
    ReadImage,
    annotated_files,
    flag,
    to_upright,
)
from diffkd.data.detection.detection_data import DetectionData, Split
from diffkd.data.folders import (
    EVALUATION_SPLITS,
    enclosed_files,
    enclosed_folder,
    format_names,
    is_file,
    is_folder,
    with_slashes,
)
from diffkd.data.images import read_orientation, upright_size

_UNKNOWN = (0, 0)  # height and width if the file does not state them


def read_coco(
    file: str | os.PathLike[str],
    images: Path,
    categories: Mapping[int, str] | None = None,
    *,
    skip_bad: bool = False,
    as_stored: bool = False,
    chosen: Collection[str] | None = None,
) -> AnnotatedFiles:
    """Read the boxes of a COCO file; missing boxes are computed from polygons and masks, and keypoints are ignored.

    Category ids may have gaps: labels count from 1 in the order of the ids. If both height and width of an image are
    missing or 0, they are read from its file. Numbers may be strings; ids may be strings or floats of whole numbers,
    and image ids any strings. An annotation with neither a box nor a polygon nor a mask is left out; one with `ignore`
    is treated as a crowd. Without a file name, that in `coco_url` is used, as LVIS has it: its last two parts if such a
    folder exists, otherwise the last.

    Args:
        file: the JSON file.
        images: folder that its file names are relative to.
        categories: ids and names of the training file's categories, which must include those of this file, by id or
            else by name; None uses this file's.
        skip_bad: keep images whose size cannot be read, with size 0 and without boxes, and leave out malformed
            annotations. Images without a file are always kept this way.
        as_stored: whether sizes and boxes refer to the stored image, before its EXIF orientation is applied.
        chosen: the names of the categories to read; boxes of others are left out. None reads all.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, lacks a key, has a value of the wrong type or a duplicate id, refers to an
            unknown image or category or to a file outside of the folder, or the size of an image cannot be read.
    """
    source = os.fspath(file)
    content = _load(source)
    own = _categories(source, _entries(content, "categories", source))
    others = set()
    if chosen is not None:
        unknown = sorted(set(chosen) - set(own.values()) - set((categories or {}).values()))
        if unknown:
            raise ValueError(
                f"{source}: no categories {format_names(unknown)}; there are {format_names(list(own.values()))}."
            )
        others = {number for number, name in own.items() if name not in chosen}
        own = {number: name for number, name in own.items() if number not in others}
    if categories is None:
        categories = own
    labels = _labels(source, own, categories)
    ids = sorted(categories)
    entries = _entries(content, "images", source)
    texts = _numbered_texts(entries)
    listed = _images(source, entries, texts, images, skip_bad, as_stored)
    by_id = {image.image_id: image for image in listed}
    malformed: list[str] = []
    for index, entry in enumerate(_entries(content, "annotations", source)):
        where = f"{source}: annotation {index}"
        try:
            image_id = _known_id(_value(entry, "image_id", where), by_id, texts)
            category = _known_id(_value(entry, "category_id", where), own.keys() | others)
            if image_id is None:
                stated = entry["image_id"]
                raise ValueError(f"{where} is of image {stated!r}, which is not among its images; add or remove it.")
            if category is None:
                raise ValueError(f"{where} is of category {entry['category_id']!r}, which is not among its categories.")
            if category in others:
                continue
            corners = _corners(entry, where)
            if corners is None:
                malformed.append(f"{where} has neither a box nor a polygon nor a mask.")
                continue
            box = ReadBox(
                corners,
                labels[category],
                name=entry.get("id", index),
                area=_number(entry.get("area")),
                crowd=any(flag(entry.get(key), key, where) for key in ("iscrowd", "ignore")),
            )
        except ValueError as error:
            if not skip_bad:
                raise
            malformed.append(str(error))
            continue
        if by_id[image_id].size != _UNKNOWN:
            by_id[image_id].boxes.append(box)
    if as_stored:
        listed = [to_upright(image) if image.size != _UNKNOWN and is_file(image.path) else image for image in listed]
    return annotated_files(source, listed, [categories[number] for number in ids], ids, malformed)


def _corners(entry: Mapping[str, Any], where: str) -> tuple[float, float, float, float] | None:
    """Return the box of an annotation, or else the bounding box of its polygons or mask; None without any."""
    if entry.get("bbox") or ("bbox" not in entry and not _polygons(entry) and not _mask(entry)):
        left, top, width, height = _numbers(_value(entry, "bbox", where), where)
        return left, top, left + width, top + height
    if entry.get("bbox") not in (None, []):
        raise ValueError(f"{where} has the bbox {entry['bbox']!r}; write [left, top, width, height] in pixels.")
    polygons = _polygons(entry)
    if not polygons:
        return _box_of_runs(_mask(entry)) if _mask(entry) else None
    x, y = ([_float(value) for one in polygons for value in one[start::2]] for start in (0, 1))
    return min(x), min(y), max(x), max(y)


def _polygons(entry: Mapping[str, Any]) -> list[list[float]]:
    """Return the polygons of an annotation with at least three corners."""
    stated: Any = entry.get("segmentation")
    if not isinstance(stated, list):
        return []
    return [
        one
        for one in stated
        if isinstance(one, list) and len(one) >= 6 and len(one) % 2 == 0 and all(map(_is_number, one))
    ]


def _mask(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mask of an annotation, {"size": [height, width], "counts": run lengths}; {} without one."""
    stated: Any = entry.get("segmentation")
    return stated if isinstance(stated, dict) and "counts" in stated else {}


def _box_of_runs(mask: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """Return the bounding box of a run-length encoded mask, None if it is empty or its counts are of no mask.

    Runs of zeros and of ones take turns, down the columns from left to right.
    """
    size, counts = mask.get("size"), mask["counts"]
    runs = _decoded_runs(counts) if isinstance(counts, str) else counts
    sides = size if isinstance(size, list) and len(size) == 2 and all(map(_is_side, size)) else [0, 0]
    height, width = sides
    if not isinstance(runs, list) or not all(isinstance(one, int) and one >= 0 for one in runs):
        return None
    if not height or sum(runs) != height * width:
        return None
    start, columns, rows = 0, list[int](), list[int]()
    for index, length in enumerate(runs):
        if index % 2 and length:
            first, last = divmod(start, height), divmod(start + length - 1, height)
            columns += [first[0], last[0]]
            # A run that goes on in another column reaches the bottom of one and the top of the next.
            rows += [first[1], last[1]] if first[0] == last[0] else [0, height - 1]
        start += length
    return (min(columns), min(rows), max(columns) + 1, max(rows) + 1) if columns else None


def _decoded_runs(text: str) -> list[int] | None:
    """Return the run lengths of COCO's compressed text, None if it is damaged.

    A number is written in groups of 5 bits, the lowest first, as characters from "0"; bit 5 says that another follows,
    and bit 4 of the last one is the sign. From the fourth on, it is the difference to the number two before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - ord("0")
        if not 0 <= group < 64 or shift > 60:
            return None
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (1 << shift) if group & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31


def _load(source: str) -> Mapping[str, Any]:
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such file; give the name of a COCO JSON file.")
    try:
        content = json.loads(Path(source).read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: no JSON ({error}); the file is damaged, write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: holds a {type(content).__name__}, not an object with images and annotations.")
    return content


def _entries(content: Mapping[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    entries = _value(content, key, source)
    if not isinstance(entries, list):
        raise ValueError(f"{source}: '{key}' is a {type(entries).__name__}; COCO has a list there.")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{source}: entry {index} of '{key}' is a {type(entry).__name__}, not an object.")
    return entries


def _categories(source: str, entries: list[dict[str, Any]]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for index, entry in enumerate(entries):
        where = f"{source}: category {index}"
        number, name = _id(entry, where), _value(entry, "name", where)
        if number in categories:
            raise ValueError(f"{where} has the id {number} of another one; give each its own.")
        categories[number] = str(name)
    if not categories:
        raise ValueError(f"{source}: no categories; give at least one.")
    twice = [name for name, count in Counter(categories.values()).items() if count > 1]
    if twice:
        rank_zero_warn(
            f"{source}: several categories are named {twice[0]!r}, and are learned and measured as different classes; "
            "give each its own name, or all the same id."
        )
    return categories


def _labels(source: str, own: Mapping[int, str], training: Mapping[int, str]) -> dict[int, int]:
    """Return the label of each category of a file by its id there.

    If the ids are not those of the training file, categories are found by name, where names are unique.
    """
    labels = {number: label for label, number in enumerate(sorted(training), start=1)}
    others = [number for number, name in own.items() if training.get(number) != name]
    if not others:
        return {number: labels[number] for number in own}
    ids = {name: number for number, name in training.items()}
    unique = len(ids) == len(training) and len(set(own.values())) == len(own)
    unknown = [number for number in others if not unique or own[number] not in ids]
    if unknown:
        number, name = unknown[0], own[unknown[0]]
        theirs = f"is {training[number]!r}" if number in training else "does not exist"
        raise ValueError(
            f"{source}: category {number}, {name!r}, {theirs} in the training file; "
            "write the same categories into all files."
        )
    name = own[others[0]]
    rank_zero_warn(
        f"{source}: {len(others)} of its categories have other ids than in the training file, and are taken by their "
        f"names: {name!r} is {others[0]} here and {ids[name]} there."
    )
    return {number: labels[ids[name]] for number, name in own.items()}


def _numbered_texts(entries: list[dict[str, Any]]) -> dict[str, int]:
    """Return an integer id per image if all ids are strings and some are not numbers; otherwise an empty mapping."""
    ids = [entry.get("id") for entry in entries]
    texts = [value for value in ids if isinstance(value, str)]
    if len(texts) < len(ids) or all(_whole_number(text) is not None for text in texts):
        return {}
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def _images(
    source: str,
    entries: list[dict[str, Any]],
    texts: Mapping[str, int],
    folder: Path,
    skip_bad: bool,
    as_stored: bool,
) -> list[ReadImage]:
    names, images, seen = [], [], set()
    from_url = _NamesInUrls(folder)
    for index, entry in enumerate(entries):
        where = f"{source}: image {index}"
        number, name = texts.get(str(entry.get("id"))), from_url(entry) or _value(entry, "file_name", where)
        number = _id(entry, where) if number is None else number
        if number in seen:
            raise ValueError(f"{where} has the id {number} of another one; give each its own.")
        if not isinstance(name, str):
            raise ValueError(f"{where} has the file name {name!r}; write a text.")
        size = _UNKNOWN
        if any(entry.get(key) is not None and _number(entry[key]) != 0 for key in ("height", "width")):
            try:
                size = _side(entry, "height", where), _side(entry, "width", where)
            except ValueError:
                if not skip_bad:
                    raise
        seen.add(number)
        names.append(name)
        images.append(ReadImage("", size, number, []))
    names = _as_stored([_without_folder(name, folder) for name in names], folder)
    paths = enclosed_files(folder, names, source)
    return [
        image._replace(path=path, size=_read_size(path, skip_bad, as_stored) if image.size == _UNKNOWN else image.size)
        for image, path in zip(images, paths, strict=True)
    ]


class _NamesInUrls:
    """Takes the file names of LVIS, `train2017/000000391895.jpg`, from its URLs.

    Args:
        folder: the folder of the images, in which `train2017` may exist or not.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._exists: dict[str, bool] = {}  # by folder, of which there are few

    def __call__(self, entry: Mapping[str, Any]) -> str:
        """Return the name of an image that has a URL and no file name, otherwise ""."""
        url: Any = entry.get("coco_url")
        if "file_name" in entry or not isinstance(url, str):
            return ""
        *_, below, name = ("", "", *PurePosixPath(url.partition("?")[0]).parts)
        if below not in self._exists:
            self._exists[below] = below != "" and is_folder(self._folder / below)
        return f"{below}/{name}" if self._exists[below] else name


def _without_folder(name: str, folder: Path) -> str:
    """Return a file name that repeats the name of its folder, as some tools write it, relative to the folder."""
    inside = name.removeprefix(f"{folder.name}/")
    if inside == name or "\0" in name or os.path.lexists(folder / name):
        return name
    return inside if is_file(folder / inside) else name


def _as_stored(names: Sequence[str], folder: Path) -> list[str]:
    """Return file names with the accents composed as on the disk: archives of macOS hold them decomposed (NFD).

    A name that exists as it is stays so. Only folders with names beyond ASCII are listed, once each.
    """
    listed: dict[Path, dict[str, str]] = {}

    def stored(above: Path, name: str) -> str:
        if above not in listed:
            try:
                found = os.listdir(above)  # noqa: PTH208 - names are all that is wanted
            except (OSError, ValueError):
                found = []
            listed[above] = {normalize("NFC", one): one for one in found} | {one: one for one in found}
        return listed[above].get(name) or listed[above].get(normalize("NFC", name), name)

    def whole(name: str) -> str:
        path = PurePath() if name.isascii() else PurePath(with_slashes(name, folder))
        if not path.parts or path.is_absolute() or ".." in path.parts:
            return name
        at = folder
        for part in path.parts:
            at /= part if part.isascii() else stored(at, part)
        return str(at.relative_to(folder))

    return [whole(name) for name in names]


def _read_size(path: str, skip_bad: bool, as_stored: bool) -> tuple[int, int]:
    if not is_file(path):
        return _UNKNOWN  # the later check counts and names all missing files
    try:
        return read_orientation(path).header.stored if as_stored else upright_size(path)
    except ValueError:
        if not skip_bad:
            raise
        return _UNKNOWN


def _value(entry: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise ValueError(f"{where} lacks '{key}'; it has {', '.join(map(repr, entry)) or 'nothing'}.")
    return entry[key]


def _id(entry: Mapping[str, Any], where: str) -> int:
    value: Any = _value(entry, "id", where)
    number = _whole_number(value)
    if number is None or abs(number) >= 1 << 63:
        raise ValueError(f"{where} has the id {value!r}; ids are integers of 64 bits.")
    return number


def _known_id(value: Any, known: Collection[int], texts: Mapping[str, int] | None = None) -> int | None:
    """Return the id given by a value, None if it is not a known id."""
    number = texts.get(str(value)) if texts else _whole_number(value)
    return number if number in known else None


def _whole_number(value: Any) -> int | None:
    """Parse a whole number, also given as a float or string; None for anything else."""
    if isinstance(value, str) and len(value) <= 20 and value.strip().removeprefix("-").isdecimal():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _side(entry: Mapping[str, Any], key: str, where: str) -> int:
    value = _number(_value(entry, key, where))
    if value is None or not 1 <= value < 1 << 31 or value != int(value):
        raise ValueError(f"{where} has the {key} {entry[key]!r}; write a number of pixels, 1 or more.")
    return int(value)


def _numbers(bbox: Any, where: str) -> tuple[float, float, float, float]:
    numbers = [_number(value) for value in bbox] if isinstance(bbox, list) and len(bbox) == 4 else [None]
    if None in numbers:
        raise ValueError(f"{where} has the bbox {bbox!r:.200}; write [left, top, width, height] in pixels.")
    left, top, width, height = (number for number in numbers if number is not None)
    return left, top, width, height


def _number(value: Any) -> float | None:
    """Return a number, also given as a text; None for anything else."""
    if isinstance(value, str) and len(value) <= 40:
        with suppress(ValueError):
            return float(value)
    return _float(value) if _is_number(value) else None


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class CocoDetection(DetectionData):
    """Serve images with boxes from COCO JSON files, decoded by worker processes at their original sizes.

    For COCO itself: `CocoDetection("coco", "annotations/instances_train2017.json",
    "annotations/instances_val2017.json", images="train2017", val_images="val2017")`.

    Roboflow's `train/_annotations.coco.json` and `valid/_annotations.coco.json`, with images beside them, are found if
    there is no `train.json` or `val.json`.

    The files are read and checked when the module is created. Boxes are clipped to their image; those without extent
    are left out with a warning. Crowd boxes (`iscrowd`) and boxes with `ignore` are left out of training and kept,
    flagged as crowds, in evaluation.

    Args:
        root: folder that the other names are relative to.
        train: JSON file of the training images.
        val: JSON file of the evaluation images; its categories must be a subset of those of `train`, and are found by
            name if they have other ids there.
        test: JSON file of the test images; None tests on `val`.
        images: folder that the file names of the training images are relative to.
        val_images: the same for the evaluation images; None uses `images`.
        test_images: the same for the test images; None uses the folder of the evaluation images.
        categories: names of the categories to use, for example all but a parent category without boxes; boxes of other
            categories are left out. None uses all.
        boxes_as_stored: whether sizes and boxes refer to the stored images, before their EXIF orientation is applied;
            the boxes are then rotated too.
        **options: the arguments of `DetectionData`, such as `batch_size` and `min_size`.

    Attributes:
        classes: the names of labels 1 to `num_classes`, ordered by category id.
        category_ids: the ids of these classes in the training file.
        skipped: one message per image left out.
        dropped: one message per box left out.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if a file is damaged or inconsistent, or names a file outside of its folder; see `read_coco`.
    """

    class_hint = "or leave the class out with categories=[...]"

    def __init__(
        self,
        root: str | os.PathLike[str],
        train: str = "train.json",
        val: str = "val.json",
        test: str | None = None,
        images: str = "images",
        val_images: str | None = None,
        test_images: str | None = None,
        categories: tuple[str, ...] | None = None,
        boxes_as_stored: bool = False,
        **options: Any,
    ) -> None:
        top = Path(root)

        def read(split: Split, training: AnnotatedFiles | None, skip_bad: bool) -> AnnotatedFiles | None:
            file = {"train": train, "val": val, "test": test}[split]
            if file is None:
                return None
            folders = {"train": (images,), "val": (val_images, images), "test": (test_images, val_images, images)}
            name = next(name for name in folders[split] if name is not None)
            file = _roboflow(top, split) if file == f"{split}.json" and not is_file(top / file) else file
            if PurePath(file).name == _ROBOFLOW and name == "images" and not is_folder(top / name):
                name = str(PurePath(file).parent)
            folder = enclosed_folder(top, name) if is_file(top / file) else top  # without a file, that is the error
            known = dict(zip(training.category_ids, training.classes, strict=True)) if training else None
            return read_coco(top / file, folder, known, skip_bad=skip_bad, as_stored=boxes_as_stored, chosen=categories)

        super().__init__(read, **options)
        self.root, self.train, self.val, self.test = root, train, val, test
        self.images, self.val_images, self.test_images = images, val_images, test_images
        self.categories, self.boxes_as_stored = categories, boxes_as_stored


_ROBOFLOW = "_annotations.coco.json"


def _roboflow(top: Path, split: Split) -> str:
    """Return the file of a split in Roboflow's layout, or else the usual one."""
    places = (f"{name}/{_ROBOFLOW}" for name in (EVALUATION_SPLITS if split == "val" else (split,)))
    return next((place for place in places if is_file(top / place)), f"{split}.json")
