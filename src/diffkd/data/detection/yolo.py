"""Detection in the text format of YOLO: reader and data module."""

import os
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from diffkd.data.detection.annotated_files import AnnotatedFiles, ReadBox, ReadImage, annotated_files
from diffkd.data.detection.detection_data import DetectionData, Split
from diffkd.data.detection.yolo_lines import BOX_OR_POLYGON, LongLines, YoloLine, parse_line
from diffkd.data.folders import (
    EVALUATION_SPLITS,
    EXTENSIONS,
    enclosed_files,
    enclosed_folder,
    format_names,
    image_files,
    is_file,
    is_folder,
    is_there,
    read_text,
    with_slashes,
)
from diffkd.data.images import upright_size
from diffkd.files.values import read_yaml

_FACTS, _FIFTYONE = "data.yaml", "dataset.yaml"
_SHORT = reprlib.Repr()  # a few YAML aliases can expand to billions of items
_SHORT.maxlevel = 2


class YoloFacts(NamedTuple):
    """Class names and splits from a `data.yaml`.

    Args:
        classes: the names of classes 0 to K - 1; None if not stated.
        splits: folders or lists of images by the name of their split.
    """

    classes: tuple[str, ...] | None
    splits: Mapping[str, list[str]]


class YoloLayout(NamedTuple):
    """Folder and label format from a `data.yaml`.

    Args:
        folder: `path`, the folder that the splits are relative to; "" if not stated.
        points: `kpt_shape`, number of key points per box and of values per key point; None if not stated.
    """

    folder: str
    points: tuple[int, int] | None


def read_yolo_layout(file: str | os.PathLike[str]) -> YoloLayout:
    """Read the `path` and the `kpt_shape` of a `data.yaml`.

    Raises:
        ValueError: if it is not a YAML mapping, or `kpt_shape` is not [n, 2] or [n, 3].
    """
    content = _mapping(file)
    folder: Any = content.get("path")
    shape: Any = content.get("kpt_shape")
    if shape is not None and not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(number) is int for number in shape)
        and 0 < shape[0] < 10_000
        and shape[1] in (2, 3)
    ):
        raise ValueError(f"{os.fspath(file)}: kpt_shape is {_SHORT.repr(shape)}; write [n, 2] or [n, 3] of n points.")
    return YoloLayout(folder if isinstance(folder, str) else "", None if shape is None else (shape[0], shape[1]))


def _mapping(file: str | os.PathLike[str]) -> dict[Any, Any]:
    source = os.fspath(file)
    text = read_text(Path(file))
    try:
        content = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{source}: no YAML ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: holds a {type(content).__name__}, not a mapping with names, train and val.")
    return content


def read_yolo_facts(file: str | os.PathLike[str]) -> YoloFacts:
    """Read the names of the classes and the splits of a `data.yaml`; `valid` and `validation` are read as `val`.

    Raises:
        ValueError: if it is not a YAML mapping, or its `names`, `nc` or splits have the wrong type.
    """
    source, content = os.fspath(file), _mapping(file)
    names: Any = content.get("names")
    if isinstance(names, dict):
        names = {int(key) if isinstance(key, str) and key.isdecimal() else key: name for key, name in names.items()}
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise ValueError(
                f"{source}: names has the keys {_SHORT.repr(list(names))}; number the classes from 0 without gaps."
            )
        names = [names[number] for number in range(len(names))]
    if names is not None and not (isinstance(names, list) and names and all(map(_is_name, names))):
        raise ValueError(
            f"{source}: names is {_SHORT.repr(names)}; write a list of the names of the classes, in quotes where YAML "
            "takes them for something else."
        )
    if names is not None and content.get("nc", len(names)) != len(names):
        raise ValueError(f"{source}: nc is {content['nc']!r}, but there are {len(names)} names.")
    splits = {}
    for key in ("train", "val", "test"):
        value = content.get(key) or next((content[name] for name in _OTHER_KEYS.get(key, ()) if name in content), None)
        listed = [value] if isinstance(value, str) else value
        if listed is not None and not (isinstance(listed, list) and all(isinstance(one, str) for one in listed)):
            raise ValueError(f"{source}: {key} is {_SHORT.repr(value)}; write a folder, or a list of folders.")
        if listed:
            splits[key] = listed
    return YoloFacts(None if names is None else tuple(map(str, names)), splits)


_OTHER_KEYS = {"val": ("valid", "validation")}


def _is_name(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def read_yolo(
    root: str | os.PathLike[str],
    places: Sequence[str],
    classes: Sequence[str],
    *,
    skip_bad: bool = False,
    keypoints: bool | None = None,
    points: tuple[int, int] | None = None,
) -> AnnotatedFiles:
    """Read the images of a split and the text files with their boxes.

    The boxes of `images/train/a.jpg` are in `labels/train/a.txt`, or else beside the image; `a.jpg.txt` and `a.TXT` are
    also found. An image without a label file has no boxes. A line is `class x y width height`, optionally followed by
    key points, or `class x1 y1 x2 y2 ...` for a polygon, whose bounding box is used.

    Args:
        root: the folder of the data set.
        places: folders of images, or text files that list images, relative to it or absolute.
        classes: the names of classes 0 to K - 1; labels count from 1.
        skip_bad: keep images whose size cannot be read, with size 0 and without boxes, and leave out malformed lines.
        keypoints: whether lines of more than five numbers are boxes with key points (True) or polygons (False); None
            decides from the lines, and warns if they may be key points.
        points: the `kpt_shape`, if known; lines are then boxes with that many key points.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there are no images, a line is malformed, a class is unknown, a file leads out of the root, or
            the size of an image cannot be read.
    """
    top = Path(root)
    source = f"{top} ({', '.join(places)})"
    names = [name for place in places for name in _image_names(top, place)]
    paths = enclosed_files(top, names, source)
    labels = _LabelFiles(top)
    texts = enclosed_files(top, [labels.of(name) for name in names], source)
    labels.warn(source, names, texts)
    reader = _LineReader(len(classes), skip_bad, points if keypoints is not False else None)
    found = []
    for path, text in zip(paths, texts, strict=True):
        try:
            size = upright_size(path)
        except ValueError:
            if not skip_bad:
                raise
            size = (0, 0)
        found.append((path, size, *(([], "") if size == (0, 0) else reader.read(Path(text)))))
    keypoints = reader.decide(source, keypoints)
    images = [
        ReadImage(path, size, index, reader.boxes(lines, size, keypoints), problem)
        for index, (path, size, lines, problem) in enumerate(found)
    ]
    files = annotated_files(source, images, classes, range(len(classes)), reader.malformed)
    return replace(files, keypoints=keypoints)


def _image_names(top: Path, place: str) -> list[str]:
    """Return the images of a folder or list, relative to the root."""
    roots = (top.absolute(), top.resolve())
    place = _relative(with_slashes(place, top), roots)
    (path,) = enclosed_files(top, [place], f"{top}") if place != "." else [str(top)]
    if place.endswith(".txt") and is_file(path):
        lines = read_text(Path(path)).splitlines()
        return [_listed_name(with_slashes(line.strip(), top), roots) for line in lines if line.strip()]
    folder = enclosed_folder(top, place)
    return [str(Path(file).relative_to(top)) for file in image_files(folder, top.resolve())]


def _relative(name: str, roots: Sequence[Path]) -> str:
    """Make a name relative to the root, if it leads there: it may be absolute, or go up and down again.

    Roboflow writes `../train/images` for `train/images`.
    """
    path = PurePath(name)
    up = path.parts[:1] == ("..",)
    inside = PurePath(*path.parts[1:])
    if up and is_there(roots[0] / inside):
        return str(inside)
    for root in roots:
        whole = PurePath(os.path.normpath(root / path)) if up else path
        if whole.is_relative_to(root):
            return str(whole.relative_to(root))
    return name


def _listed_name(name: str, roots: Sequence[Path]) -> str:
    """Make a listed name relative to the root; CVAT writes it relative to the parent, `data/obj_train_data/a.png`."""
    path = PurePath(_relative(name, roots))
    above = len(path.parts) > 1 and not path.is_absolute() and not is_there(roots[0] / path)
    inside = PurePath(*path.parts[1:])
    return str(inside if above and is_file(roots[0] / inside) else path)


class _Labels(NamedTuple):
    """The text files of a folder.

    Args:
        exact: name by the name with its extension in lower case.
        folded: name by the case-folded name; names that differ in case only are left out.
    """

    exact: dict[str, str]
    folded: dict[str, str]


class _LabelFiles:
    """Finds the label file of each image; folders are listed once.

    Args:
        top: the folder of the data set.
    """

    def __init__(self, top: Path) -> None:
        self._top = top
        self._labels: dict[PurePath, _Labels] = {}
        self._images: dict[PurePath, Counter[str]] = {}

    def of(self, name: str) -> str:
        """Return the label file of an image, both relative to the root; if none exists, the default name.

        A name that differs in case is taken if no other image of the folder could mean it.
        """
        image, usual = PurePath(name), PurePath(_label_name(name))
        folders, stems = list(dict.fromkeys((usual.parent, image.parent))), (image.stem, image.name)
        for folder in folders:
            for stem in stems:
                if stored := self._listed(folder).exact.get(f"{stem}.txt"):
                    return str(folder / stored)
        for folder in folders:
            for stem in stems:
                stored = self._listed(folder).folded.get(f"{stem}.txt".casefold())
                if stored and self._alike(image.parent)[stem.casefold()] < 2:
                    return str(folder / stored)
        return str(usual)

    def warn(self, source: str, names: Sequence[str], texts: Sequence[str]) -> None:
        """Warn if no image has a label file, or if some have none while some label files have no image."""
        without = [index for index, text in enumerate(texts) if not is_file(text)]
        if texts and len(without) == len(texts):
            rank_zero_warn(f"{source}: no image has a file of labels; that of the first would be {texts[0]}.")
        elif without:
            used = set(map(os.path.normpath, texts))
            beside = {PurePath(_label_name(names[index])).parent for index in without}
            unused = sorted(
                path
                for folder in beside
                for file in self._listed(folder).exact.values()
                if file != "classes.txt" and os.path.normpath(path := str(self._top / folder / file)) not in used
            )
            if unused:
                rank_zero_warn(
                    f"{source}: {len(without)} of {len(texts)} images have no label file and pass for images without "
                    f"boxes, and {len(unused)} label file(s) belong to none of the images: {format_names(unused)}; "
                    f"that of the first would be {texts[without[0]]}."
                )

    def _listed(self, folder: PurePath) -> _Labels:
        """Return the text files of a folder, without hidden ones."""
        if folder not in self._labels:
            files = [file for file in self._names(folder) if file.lower().endswith(".txt")]
            exact = {file[:-4] + ".txt": file for file in files}
            counts = Counter(file.casefold() for file in exact)
            folded = {file.casefold(): stored for file, stored in exact.items() if counts[file.casefold()] == 1}
            self._labels[folder] = _Labels(exact, folded)
        return self._labels[folder]

    def _alike(self, folder: PurePath) -> Counter[str]:
        """Return how many spellings the stems and names of the images in a folder have, by the case-folded one."""
        if folder not in self._images:
            images = [name for name in self._names(folder) if PurePath(name).suffix.lower() in EXTENSIONS]
            spelled = {PurePath(name).stem for name in images} | set(images)
            self._images[folder] = Counter(map(str.casefold, spelled))
        return self._images[folder]

    def _names(self, folder: PurePath) -> list[str]:
        try:
            names = os.listdir(self._top / folder)  # noqa: PTH208 - half the time of a list of paths
        except OSError:
            return []
        return sorted(name for name in names if not name.startswith("."))


def _label_name(name: str) -> str:
    parts = list(PurePath(name).with_suffix(".txt").parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return str(PurePath(*parts))


_Line = tuple[YoloLine, str, int]  # the parsed line, its file and its number


class _LineReader:
    """Reads the label files of a split, then decides whether its long lines are key points or polygons.

    Args:
        classes: number of classes.
        skip_bad: leave out malformed lines instead of raising.
        points: the `kpt_shape`, if it is known.

    Attributes:
        malformed: one message per line left out.
    """

    def __init__(self, classes: int, skip_bad: bool, points: tuple[int, int] | None) -> None:
        self._classes, self._skip, self._points = classes, skip_bad, points
        self._long = LongLines()
        self.malformed: list[str] = []

    def read(self, file: Path) -> tuple[list[_Line], str]:
        """Return the lines of a file, and why it cannot be used if it is not text and broken files are skipped."""
        if not is_file(file):
            return [], ""
        try:
            text = read_text(file)
        except ValueError as error:
            if not self._skip:
                raise
            return [], str(error)
        lines: list[_Line] = []
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                said, values = parse_line(line, self._classes, self._points)
            except ValueError as error:
                self._refuse(file, number, str(error))
                continue
            if len(values) > 4:
                self._long.count(values)
            lines.append((said, str(file), number))
        return lines, ""

    def _refuse(self, file: str | Path, number: int, what: str) -> None:
        message = f"{file}: line {number} {what}"
        if not self._skip:
            raise ValueError(message)
        self.malformed.append(message)

    def decide(self, source: str, keypoints: bool | None) -> bool | None:
        """Return whether the long lines have key points, None without long lines; warn if they are ambiguous."""
        count = sum(self._long.lengths.values())
        if keypoints is None and count:
            keypoints = self._points is not None or self._long.are_points
            if self._points is None and self._long.share > 0.5:
                one, other = ("boxes with key points", "polygons")[:: 1 if keypoints else -1]
                rank_zero_warn(
                    f"{source}: {count} line(s) of {max(self._long.lengths) + 1} numbers are taken for {one}, and "
                    f"might be {other}; write kpt_shape into data.yaml, or set keypoints=true or keypoints=false."
                )

        return keypoints

    def boxes(self, lines: Sequence[_Line], size: tuple[int, int], keypoints: bool | None) -> list[ReadBox]:
        """Return the boxes of the label lines of an image of size (H, W)."""
        height, width = size
        found = []
        for said, file, number in lines:
            corners = said.box if keypoints or said.numbers == 4 else said.polygon
            if corners is None:
                self._refuse(file, number, f"has {said.numbers + 1} numbers; {BOX_OR_POLYGON}")
                continue
            left, top, right, bottom = corners
            scaled = (left * width, top * height, right * width, bottom * height)
            found.append(ReadBox(scaled, said.label + 1, f"of line {number}"))
        return found


class YoloDetection(DetectionData):
    """Serve images with boxes from one text file per image, decoded by worker processes at their original sizes.

    The boxes of `images/train/a.jpg` are in `labels/train/a.txt`. The files are read and checked when the module is
    created. Boxes are clipped to their image; those without extent are left out with a warning.

    Args:
        root: folder of the data set.
        train: folder of the training images, or text file that lists them, relative to the root; None uses the entry of
            `data.yaml`, or else `images/train`, or with `val_share` all images of `images` or of the root.
        val: the same for the evaluation images; None uses the entry of `data.yaml`, or else `images/val`.
        test: the same for the test images; None uses the entry of `data.yaml`, or else tests on `val`.
        classes: the names of classes 0 to K - 1, which become labels 1 to K; None uses those of `data.yaml`, or else of
            `obj.names` or `classes.txt`, one a line.
        facts: name of the `data.yaml` in the root, or else `dataset.yaml`; it may be missing if the classes are given
            otherwise.
        keypoints: whether lines of more than five numbers are boxes with key points (true) or polygons (false); None:
            key points if `data.yaml` has a `kpt_shape`, otherwise decided from the lines.
        **options: the arguments of `DetectionData`, such as `batch_size` and `min_size`.

    Attributes:
        classes: the names of labels 1 to `num_classes`.
        category_ids: the class numbers in the files, from 0.
        skipped: one message per image left out.
        dropped: one message per box left out.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if a file is damaged, a class is unknown, no file or argument names the classes, or a path leads out
            of the root.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        classes: tuple[str, ...] | None = None,
        facts: str = _FACTS,
        keypoints: bool | None = None,
        **options: Any,
    ) -> None:
        top = Path(root)
        other = facts == _FACTS and not (top / facts).is_file() and (top / _FIFTYONE).is_file()
        file = top / (_FIFTYONE if other else facts)
        said = read_yolo_facts(file) if file.is_file() else YoloFacts(None, {})
        folder, points = read_yolo_layout(file) if file.is_file() else YoloLayout("", None)
        names = classes or said.classes or _listed_classes(top)
        if not names:
            raise ValueError(
                f"{file}: no such file, or no names in it; give the names of the classes, or write them into "
                f"{top / 'classes.txt'}, one a line."
            )
        unsplit = None if train else _unsplit_place(top)
        shared = options.get("val_share") is not None
        given = {"train": train, "val": val, "test": test}
        stated = _stated_places(file, top, folder, {key: said.splits[key] for key in said.splits if not given[key]})

        def read(split: Split, training: AnnotatedFiles | None, skip_bad: bool) -> AnnotatedFiles | None:
            place = given[split]
            places = stated.get(split, {}) if place is None else {place: _below(top, folder, place)}
            missing = [one for one, found in places.items() if not found]
            if split == "test" and place is None and (missing or not places):
                return None  # Roboflow lists a test folder that it may not export
            if missing:
                raise FileNotFoundError(
                    f"{file}: {split} is {missing[0]!r}, but neither this nor the end of it is in {top}; write a "
                    f"folder or list relative to {top}, or give it by {split}=..."
                )
            chosen = list(places.values()) or [_usual_place(top, folder, split)]
            if split == "train" and unsplit and not places and not _is_in(top, chosen[0]):
                if not shared:
                    raise FileNotFoundError(
                        f"{top / chosen[0]}: no such folder; set val_share=0.1 to train on all images of "
                        f"{top / unsplit} but a tenth, which is held back for evaluation."
                    )
                chosen = [unsplit]
            known = keypoints if keypoints is not None or training is None else training.keypoints
            return read_yolo(root, chosen, names, skip_bad=skip_bad, keypoints=known, points=points)

        super().__init__(read, **options)
        self.root, self.train, self.val, self.test = root, train, val, test
        self.facts, self.keypoints = facts, keypoints


# Of CVAT and Darknet; of Label Studio and, beside the images or the labels, LabelImg.
_CLASS_LISTS = ("obj.names", "classes.txt", "labels/classes.txt", "labels/train/classes.txt")


def _listed_classes(top: Path) -> tuple[str, ...]:
    """Return the classes of the lists that tools write instead of a `data.yaml`, one a line; () without a list."""
    file = next((top / name for name in _CLASS_LISTS if (top / name).is_file()), None)
    names = [] if file is None else [line.strip() for line in read_text(file).rstrip().splitlines()]
    if not all(names):
        raise ValueError(f"{file}: line {names.index('') + 1} is empty; give each class a name, one a line.")
    return tuple(names)


def _unsplit_place(top: Path) -> str:
    """Return the folder of images that are in no folder of a split, as annotation tools write them; "" without any."""
    for place in ("images", "."):
        if is_folder(top / place):
            with os.scandir(top / place) as entries:
                if any(os.path.splitext(entry.name)[1].lower() in EXTENSIONS for entry in entries):  # noqa: PTH122
                    return place
    return ""


def _is_in(top: Path, place: str) -> bool:
    inside = PurePath(_relative(with_slashes(place, top), (top.absolute(), top.resolve())))
    return bool(place) and not inside.is_absolute() and ".." not in inside.parts and is_there(top / inside)


def _below(top: Path, folder: str, place: str) -> str:
    """Return a place below `path` of the `data.yaml` if it exists there, otherwise unchanged."""
    below = str(PurePath(folder) / place)
    return below if folder and _is_in(top, below) else place


def _stated_places(
    file: Path, top: Path, folder: str, splits: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, str]]:
    """Return where the places of a `data.yaml` are below the root, by split and place; "" if they are not there.

    A data set that was moved has the places of where it was made. Of those that are not below the root, the longest end
    that is there is taken, with a warning. An end of several places is not, nor is `images`: it may hold other splits.
    """
    found = {split: {place: _below(top, folder, place) for place in places} for split, places in splits.items()}
    lost = {place for places in found.values() for place, inside in places.items() if not _is_in(top, inside)}
    ends = {place: _longest_end(top, str(PurePath(folder) / place)) for place in sorted(lost)}
    shared = [end for end, count in Counter(ends.values()).items() if count > 1]
    ends = {place: "" if end in shared else end for place, end in ends.items()}
    taken = [f"{end!r} for {place!r}" for place, end in ends.items() if end]
    if taken:
        rank_zero_warn(
            f"{file}: not all of its places are in {top}; taken are {', '.join(taken)}: write these instead."
        )
    return {split: {place: ends.get(place, at) for place, at in places.items()} for split, places in found.items()}


def _longest_end(top: Path, place: str) -> str:
    parts = PurePath(with_slashes(place, top)).parts
    ends = [PurePath(*parts[start:]) for start in range(1, len(parts))]
    safe = (end for end in ends if ".." not in end.parts and str(end) != "images")
    return next((str(end) for end in safe if is_there(top / end)), "")


def _usual_place(top: Path, folder: str, split: str) -> str:
    """Return the first usual folder of a split that exists, or else `images/SPLIT`."""
    names = EVALUATION_SPLITS if split == "val" else (split,)
    places = [place for name in names for place in (f"images/{name}", f"{name}/images", f"{name}.txt")]
    found = (_below(top, folder, place) for place in places)
    return next((place for place in found if _is_in(top, place)), f"images/{split}")
