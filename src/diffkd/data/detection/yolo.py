"""Images with boxes in the text format of YOLO, as a data module."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.utilities import rank_zero_warn

from diffkd.data.detection.annotated_files import AnnotatedFiles, ReadBox, ReadImage, annotated_files
from diffkd.data.detection.detection_data import DetectionData, Split
from diffkd.data.folders import enclosed_files, enclosed_folder, image_files, with_slashes
from diffkd.data.images import upright_size


class YoloFacts(NamedTuple):
    """Hold what a `data.yaml` says.

    Args:
        classes: the names of classes 0 to K - 1; None if it says nothing.
        splits: folders or lists of images by the name of their split.
    """

    classes: tuple[str, ...] | None
    splits: Mapping[str, list[str]]


def read_yolo_facts(file: str | os.PathLike[str]) -> YoloFacts:
    """Read a `data.yaml`; its `path` is passed over, since the folder is known.

    Raises:
        ValueError: if it is no YAML mapping, or its `names`, `nc` or splits are of the wrong kind.
    """
    source = os.fspath(file)
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: no YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: holds a {type(content).__name__}, not a mapping with names, train and val.")
    names: Any = content.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise ValueError(f"{source}: names has the keys {list(names)}; number the classes from 0 without gaps.")
        names = [names[number] for number in range(len(names))]
    if names is not None and not (isinstance(names, list) and names and all(map(_is_name, names))):
        raise ValueError(
            f"{source}: names is {names!r}; write a list of the names of the classes, in quotes where YAML takes them "
            "for something else."
        )
    if names is not None and content.get("nc", len(names)) != len(names):
        raise ValueError(f"{source}: nc is {content['nc']!r}, but there are {len(names)} names.")
    splits = {}
    for key in ("train", "val", "test"):
        value = content.get(key)
        listed = [value] if isinstance(value, str) else value
        if listed is not None and not (isinstance(listed, list) and all(isinstance(one, str) for one in listed)):
            raise ValueError(f"{source}: {key} is {value!r}; write a folder, or a list of folders.")
        if listed:
            splits[key] = listed
    return YoloFacts(None if names is None else tuple(map(str, names)), splits)


def _is_name(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def read_yolo(
    root: str | os.PathLike[str], places: Sequence[str], classes: Sequence[str], *, skip_bad: bool = False
) -> AnnotatedFiles:
    """Read the images of a split and the text files with their boxes.

    The boxes of `images/train/a.jpg` are in `labels/train/a.txt`; without a folder `images` in its path, they are
    beside the image. An image without such a file has no boxes. A line is `class x y width height`, or
    `class x1 y1 x2 y2 ...` of a polygon, whose bounding box is taken.

    Args:
        root: the folder of the data set.
        places: folders of images, or text files that list images, relative to it or absolute.
        classes: the names of classes 0 to K - 1; labels count from 1.
        skip_bad: whether images whose size cannot be read are let pass, with size 0 and without boxes.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there are no images, a line is malformed, a class is unknown, a file leads out of the root, or
            the size of an image cannot be read.
    """
    top = Path(root)
    source = f"{top} ({', '.join(places)})"
    names = [name for place in places for name in _image_names(top, place)]
    paths = enclosed_files(top, names, source)
    texts = enclosed_files(top, [_label_name(name) for name in names], source)
    if texts and not any(Path(text).is_file() for text in texts):
        rank_zero_warn(f"{source}: no image has a file of labels; that of the first would be {texts[0]}.")
    images = []
    for index, (path, text) in enumerate(zip(paths, texts, strict=True)):
        try:
            size = upright_size(path)
        except ValueError:
            if not skip_bad:
                raise
            images.append(ReadImage(path, (0, 0), index, []))
            continue
        images.append(ReadImage(path, size, index, _boxes(Path(text), size, len(classes))))
    return annotated_files(source, images, classes, range(len(classes)))


def _image_names(top: Path, place: str) -> list[str]:
    """Return the images of a folder or list, relative to the root."""
    roots = (top.absolute(), top.resolve())
    place = _relative(with_slashes(place, top), roots)
    (path,) = enclosed_files(top, [place], f"{top}")
    if place.endswith(".txt") and Path(path).is_file():
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        return [_relative(with_slashes(line.strip(), top), roots) for line in lines if line.strip()]
    folder = enclosed_folder(top, place)
    return [str(Path(file).relative_to(top)) for file in image_files(folder, top.resolve())]


def _relative(name: str, roots: Sequence[Path]) -> str:
    """Return a name relative to the root where it is absolute, or written from a folder beside as Roboflow does."""
    path = PurePath(name)
    for root in roots:
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    inside = PurePath(*path.parts[1:])
    return str(inside) if path.parts[:1] == ("..",) and (roots[0] / inside).exists() else name


def _label_name(name: str) -> str:
    parts = list(PurePath(name).with_suffix(".txt").parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return str(PurePath(*parts))


def _boxes(file: Path, size: tuple[int, int], classes: int) -> list[ReadBox]:
    if not file.is_file():
        return []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no text ({error}).") from error
    return [
        _box(line.split(), f"{file}: line {number}", number, size, classes)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _box(words: list[str], where: str, number: int, size: tuple[int, int], classes: int) -> ReadBox:
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise ValueError(
            f"{where} has {len(words)} numbers; write class, x, y, width, height, or a class and a polygon."
        )
    try:
        label, values = int(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise ValueError(f"{where} is {' '.join(words)!r}; write a whole number and then fractions.") from None
    if not 0 <= label < classes:
        raise ValueError(f"{where} is of class {label}; there are 0 to {classes - 1}.")
    if len(words) == 5:
        x, y, width, height = values
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    else:
        left, top, right, bottom = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    return ReadBox((left * size[1], top * size[0], right * size[1], bottom * size[0]), label + 1, f"of line {number}")


class YoloDetection(DetectionData):
    """Serve images whose boxes are in one text file each, decoded by worker processes at their own sizes.

    The boxes of `images/train/a.jpg` are in `labels/train/a.txt`. The files are read and checked when the module is
    made. Boxes are cut at the border of their image; those without extent are left out with a warning.

    Args:
        root: folder of the data set.
        train: folder of the training images, or text file that lists them, relative to the root; None takes what
            `data.yaml` says, or else `images/train`.
        val: that of the evaluation images; None takes what `data.yaml` says, or else `images/val`.
        test: that of the test images; None takes what `data.yaml` says, or else tests on `val`.
        classes: the names of classes 0 to K - 1, which become labels 1 to K; None takes those of `data.yaml`.
        facts: name of the `data.yaml` in the root; it may be missing if `classes` are given.
        **options: the arguments of `DetectionData`, such as `batch_size` and `min_size`.

    Attributes:
        classes: the names of labels 1 to `num_classes`.
        category_ids: the numbers these have in the files, from 0.
        skipped: one message per image left out.
        dropped: one message per box left out.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if a file is damaged, a class is unknown, nobody names the classes, or a file leads out of the root.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        classes: tuple[str, ...] | None = None,
        facts: str = "data.yaml",
        **options: Any,
    ) -> None:
        file = Path(root) / facts
        said = read_yolo_facts(file) if file.is_file() else YoloFacts(None, {})
        names = classes or said.classes
        if not names:
            raise ValueError(f"{file}: no such file, or no names in it; give the names of the classes.")
        given = {"train": train, "val": val, "test": test}

        def read(split: Split, training: AnnotatedFiles | None, skip_bad: bool) -> AnnotatedFiles | None:
            place = given[split]
            if split == "test" and place is None and split not in said.splits:
                return None
            places = [place] if place is not None else said.splits.get(split, [f"images/{split}"])
            return read_yolo(root, places, names, skip_bad=skip_bad)

        super().__init__(read, **options)
        self.root, self.train, self.val, self.test = root, train, val, test
        self.facts = facts
