"""Detection in Pascal VOC's XML format: reader and data module."""

import codecs
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

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
    EXTENSIONS,
    enclosed_files,
    enclosed_folder,
    format_names,
    is_file,
    read_text,
)
from diffkd.data.images import read_orientation, upright_size


class VocSplit(NamedTuple):
    """Location of a split.

    Args:
        source: the list or folder, for messages.
        files: the XML files.
        images: folder of the image files.
    """

    source: str
    files: list[str]
    images: Path


def find_voc_split(root: str | os.PathLike[str], split: str) -> VocSplit:
    """Find the XML files of a split.

    A split is a list `ImageSets/Main/SPLIT.txt` of names in `Annotations`, with images in `JPEGImages`; or a folder
    SPLIT that contains XML files and images, or its own `Annotations` and `JPEGImages`. "." is all of the root. The
    folders may also be called `annotations`, and `images` or `Images`, and lie in `VOCdevkit/VOC2012` or `VOC2007`.

    Raises:
        FileNotFoundError: if neither exists.
        ValueError: if the split is empty, its list is not in UTF-8, or a name is listed twice or leads out of the
            folder.
    """
    top = _voc_root(Path(root))
    names = top / "ImageSets" / "Main" / f"{split}.txt"
    if names.is_file():
        folder, source = top, str(names)
        lines = [line.strip() for line in read_text(names).splitlines() if line.strip()]
    elif (top / split).is_dir():
        folder = enclosed_folder(top, split)
        source, lines = str(folder), []
    else:
        raise FileNotFoundError(f"{names}: no such list, and {top / split} is no folder; {_mend(top)}.")
    annotations = _inside(folder, _ANNOTATIONS)
    images = _inside(folder, _IMAGES if annotations != folder else _IMAGES[:1])
    if names.is_file():
        xml_names = _listed_names(lines, annotations)
        twice = [name for name, count in Counter(xml_names).items() if count > 1]
        if twice:
            raise ValueError(f"{names}: lists {twice[0].removesuffix('.xml')!r} more than once; keep one of them.")
    else:
        xml_names = sorted(path.name for path in annotations.glob("*.xml") if not path.name.startswith("."))
    if not xml_names:
        raise ValueError(f"{source}: no XML files; give at least one.")
    return VocSplit(source, enclosed_files(annotations, xml_names, source), images)


_ANNOTATIONS = ("Annotations", "annotations")
_IMAGES = ("JPEGImages", "images", "Images")


def _inside(folder: Path, names: Sequence[str]) -> Path:
    """Return the first folder of these names in a folder, or else the folder itself."""
    return next((enclosed_folder(folder, name) for name in names if (folder / name).is_dir()), folder)


def _voc_root(root: Path) -> Path:
    """Return the folder that holds `Annotations`: the root, or the only one of the official archives inside.

    Raises:
        ValueError: if there are several.
    """
    inside = [f"{above}{year}" for above in ("VOCdevkit/", "") for year in ("VOC2012", "VOC2007")]
    found = [name for name in inside if (root / name / "Annotations").is_dir()]
    if any((root / name).is_dir() for name in (*_ANNOTATIONS, "ImageSets")) or not found:
        return root
    if len(found) > 1:
        raise ValueError(f"{root}: holds {format_names(found)}; give one of them as the root.")
    return enclosed_folder(root, found[0])


def _is_unsplit(top: Path) -> bool:
    """Return whether a folder has annotations and no lists of splits."""
    annotated = _inside(top, _ANNOTATIONS) != top or any(top.glob("[!.]*.xml"))
    return annotated and not (top / "ImageSets" / "Main").is_dir()


def _mend(top: Path) -> str:
    """Return what to do where a split is missing."""
    if _is_unsplit(top):
        return "set val_share=0.1 to train on all images but a tenth, which is held back for evaluation"
    lists = sorted(path.stem for path in (top / "ImageSets" / "Main").glob("[!.]*.txt"))
    return f"give the name of a split{f', such as {format_names(lists)}' if lists else ''}"


def read_voc(
    split: VocSplit,
    classes: Sequence[str] | None = None,
    first_pixel: int = 0,
    *,
    skip_bad: bool = False,
    as_stored: bool = False,
) -> AnnotatedFiles:
    """Read the boxes of a split.

    Objects marked as difficult are treated as crowds: left out of training, and flagged in evaluation.

    Args:
        split: the result of `find_voc_split`.
        classes: the names of labels 1 to K; None uses the names that occur in the split, sorted.
        first_pixel: coordinate of the first pixel: 1 if left and top count from 1 and right and bottom are inclusive,
            as in the official VOC files; 0 if corners are used unchanged.
        skip_bad: keep images whose XML file cannot be used, for the later check to leave out, and leave out malformed
            objects.
        as_stored: whether sizes and boxes refer to the stored image, before its EXIF orientation is applied.

    Raises:
        FileNotFoundError: if an XML file is missing.
        ValueError: if a file is not XML, defines entities, lacks an element, or names an unknown class or a file
            outside of the folder.
    """
    if first_pixel not in (0, 1):
        raise ValueError(f"first_pixel={first_pixel} is neither 0 nor 1.")
    roots, problems = [], {}
    for file in split.files:
        try:
            roots.append(_parse(file))
        except (ValueError, FileNotFoundError) as error:
            if not skip_bad:
                raise
            roots.append(ElementTree.Element("annotation"))
            problems[file] = str(error)
    if classes is None:
        classes = _classes(split, roots, skip_bad)
    labels = {name: label for label, name in enumerate(classes, start=1)}
    images, malformed, stale = [], [], list[str]()
    stored = _StoredImages(split.images)
    for index, (file, root) in enumerate(zip(split.files, roots, strict=True)):
        boxes, path, size = [], str(split.images / f"{Path(file).stem}.jpg"), (0, 0)
        for number, one in enumerate(_objects(root)):
            try:
                boxes.append(_box(one, number, labels, file, first_pixel))
            except ValueError as error:
                if not skip_bad:
                    raise
                malformed.append(str(error))
        image = ReadImage(path, size, index, boxes)
        try:
            path, other = _image(file, root, stored)
            stale += [f"{file} names {other!r}"] if other else []
            image = image._replace(path=path, size=_size(root, file, path, as_stored))
            image = to_upright(image) if as_stored and is_file(path) else image
        except ValueError as error:
            if not skip_bad:
                raise
            problems.setdefault(file, str(error))
        images.append(image._replace(problem=problems[file], boxes=[]) if file in problems else image)
    if stale:
        rank_zero_warn(
            f"{split.source}: {len(stale)} XML file(s) have the <filename> of another image than the one that is "
            f"called like them, which is taken: {stale[0]}; where the boxes are those of the named image, rename the "
            "XML file."
        )
    return annotated_files(split.source, images, classes, range(1, len(classes) + 1), malformed)


def _classes(split: VocSplit, roots: Sequence[ElementTree.Element], skip_bad: bool) -> list[str]:
    """Return the class names that occur, sorted."""
    found = set()
    for file, root in zip(split.files, roots, strict=True):
        for one in _objects(root):
            try:
                found.add(_text(one, "name", file))
            except ValueError:
                if not skip_bad:
                    raise
    if not found:
        raise ValueError(f"{split.source}: no objects, hence no classes; give the names of the classes.")
    return sorted(found)


class _NoDoctypeBuilder:
    """A tree builder that refuses document type declarations, which could expand or fetch entities."""

    def __init__(self) -> None:
        builder = ElementTree.TreeBuilder()
        self.start, self.end, self.data, self.close = builder.start, builder.end, builder.data, builder.close

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise ValueError("it has a document type, which may define entities; remove it")


def _parse(file: str) -> ElementTree.Element:
    if not is_file(file):
        raise FileNotFoundError(f"{file}: no such file; add it, or remove its name from the list.")
    content = Path(file).read_bytes()
    try:
        root = parse_xml(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{file}: no XML of Pascal VOC ({error}).") from error
    if root.tag != "annotation" and not _objects(root):
        raise ValueError(f"{file}: no XML of Pascal VOC (its root is {root.tag!r}, not 'annotation').")
    return root


def parse_xml(content: bytes) -> ElementTree.Element:
    """Parse an annotation in any encoding that Python knows, without entities of its own.

    Raises:
        ElementTree.ParseError: if it is no XML.
        ValueError: if it has a document type, or bytes that its encoding does not have.
        LookupError: if its encoding is unknown.
    """
    try:
        return _tree(content)
    except (ElementTree.ParseError, ValueError, LookupError):
        text = _decoded(content)
        if text is None:
            raise
        return _tree(text)


def _tree(content: str | bytes) -> ElementTree.Element:
    parser = ElementTree.XMLParser(target=_NoDoctypeBuilder())
    parser.feed(content)
    root: ElementTree.Element = parser.close()
    return root


_DECLARED = re.compile(rb"""\s*<\?xml[^>]{0,100}?encoding\s*=\s*["']([\w.-]{1,40})["'][^>]{0,100}?\?>""")


def _decoded(content: bytes) -> str | None:
    """Decode an XML file by its declared encoding: Python supports more encodings than the parser."""
    declared = _DECLARED.match(content)
    if declared is None or codecs.lookup(declared[1].decode()).name in _NO_ENCODINGS:
        return None
    return content[declared.end() :].decode(declared[1].decode())


# Python codecs that are not text encodings of files.
_NO_ENCODINGS = ("idna", "punycode", "raw_unicode_escape", "unicode_escape", "raw-unicode-escape", "unicode-escape")


def _objects(root: ElementTree.Element) -> list[ElementTree.Element]:
    return root.findall("object")


def _box(one: ElementTree.Element, number: int, labels: dict[str, int], file: str, first_pixel: int) -> ReadBox:
    where = f"{file}: object {number}"
    name = _text(one, "name", where)
    if name not in labels:
        raise ValueError(f"{where} is of class {name!r}, which is none of {', '.join(map(repr, labels))}.")
    left, top, right, bottom = (
        _number(_text(one, f"bndbox/{side}", where), where) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    difficult = flag(one.findtext("difficult"), "difficult", where)
    return ReadBox((left - first_pixel, top - first_pixel, right, bottom), labels[name], number, crowd=difficult)


class _StoredImages:
    """The image files of a folder, listed once.

    Args:
        folder: the folder.

    Attributes:
        names: their names.
        by_stem: name by stem; of several with one stem, the .jpg or else the first in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with os.scandir(folder) as entries:
            found = [os.path.splitext(entry.name) for entry in entries if entry.is_file()]  # noqa: PTH122 - is faster
        found = [one for one in found if one[1].lower() in EXTENSIONS]
        found.sort(key=lambda one: (one[1] != ".jpg", not one[1].islower(), one), reverse=True)
        self.by_stem = {stem: stem + extension for stem, extension in found}
        self.names = {stem + extension for stem, extension in found}

    def has(self, name: str) -> bool:
        return bool(name) and (name in self.names or is_file(self.folder / name))


def _image(file: str, root: ElementTree.Element, stored: _StoredImages) -> tuple[str, str]:
    """Return the image of an XML file, and its `<filename>` if that is another image, else "".

    The image with the stem of the XML file goes first: `<filename>` stays as it was when files are renamed together.
    """
    stem, stated = Path(file).stem, (root.findtext("filename") or "").strip()
    if "\\" in stated:  # a Windows path of the labelling machine
        stated = PureWindowsPath(stated).name
    elif stated.startswith("/") and stored.has(name := PurePosixPath(stated).name):
        stated = name  # a path on another machine
    own = stored.by_stem.get(stem, "")
    if not stated:
        return enclosed_files(stored.folder, [own or f"{stem}.jpg"], file)[0], ""
    (path,) = enclosed_files(stored.folder, [stated], file)
    exists = stored.has(stated)
    if not own or (exists and PurePosixPath(stated).stem == stem):
        return path, ""
    return enclosed_files(stored.folder, [own], file)[0], stated if exists else ""


def _size(root: ElementTree.Element, file: str, path: str, as_stored: bool) -> tuple[int, int]:
    """Return the stated height and width, or those of the image file if none are stated."""
    stated = [(root.findtext(f"size/{side}") or "").strip() for side in ("height", "width")]
    if all(side in ("", "0") for side in stated):
        return read_orientation(path).header.stored if as_stored else upright_size(path)
    height, width = (_number(side, file) for side in stated)
    if not all(1 <= side < 1 << 31 and side == int(side) for side in (height, width)):
        raise ValueError(f"{file}: its size is {stated[1]}x{stated[0]}; write numbers of pixels, 1 or more.")
    return int(height), int(width)


def _text(element: ElementTree.Element, path: str, where: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"{where} lacks '{path}'.")
    return text


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where} has {text!r} where a number of pixels belongs.") from None


def _listed_names(lines: Sequence[str], annotations: Path) -> list[str]:
    """Return the XML files that the lines of a list name.

    A line may hold the extension of the image or, in lists of single classes, 1, 0 or -1 after the name; it holds
    neither if there is an XML file of the whole name.
    """
    stored = set(os.listdir(annotations))  # noqa: PTH208 - names are all that is wanted

    def exists(name: str) -> bool:
        return f"{name}.xml" in stored or ("/" in name and is_file(annotations / f"{name}.xml"))

    found = []
    for line in lines:
        name, _, flag = line.rpartition(" ")
        name = name.strip() if name and flag in ("1", "0", "-1") and not exists(line) else line
        stem, dot, extension = name.rpartition(".")
        image = stem and f"{dot}{extension}".lower() in EXTENSIONS
        found.append(f"{stem if image and not exists(name) else name}.xml")
    return found


class VocDetection(DetectionData):
    """Serve images with boxes from one XML file per image, decoded by worker processes at their original sizes.

    A split is a list `ImageSets/Main/SPLIT.txt` over `Annotations/*.xml` and `JPEGImages`, or a folder that contains
    XML files and images; see `find_voc_split`. Without either, `val_share` splits all images of the root. The files are
    read and checked when the module is created. Boxes are clipped to their image; those without extent are left out
    with a warning. Objects marked as difficult are left out of training and kept, flagged as crowds, in evaluation.

    Args:
        root: folder of the data set.
        train: name of the training split.
        val: name of the evaluation split; "val" may also be named "valid", "validation" or "test".
        test: name of the test split; None tests on `val`.
        classes: the names of labels 1 to K; None uses the names in the training split, sorted.
        first_pixel: coordinate of the first pixel: 1 for the official VOC files, whose corners count from 1 and are
            inclusive; 0 uses corners unchanged.
        boxes_as_stored: whether sizes and boxes refer to the stored images, before their EXIF orientation is applied;
            the boxes are then rotated too.
        **options: the arguments of `DetectionData`, such as `batch_size` and `min_size`.

    Attributes:
        classes: the names of labels 1 to `num_classes`.
        category_ids: the labels themselves.
        skipped: one message per image left out.
        dropped: one message per box left out.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if a file is damaged, an object is of an unknown class, or a file leads out of the folder.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        classes: tuple[str, ...] | None = None,
        first_pixel: int = 0,
        boxes_as_stored: bool = False,
        **options: Any,
    ) -> None:
        shared = options.get("val_share") is not None

        def read(split: Split, training: AnnotatedFiles | None, skip_bad: bool) -> AnnotatedFiles | None:
            top = _voc_root(Path(root))
            name = {"train": train, "val": val, "test": test}[split]
            if name is None:
                return None
            if split == "val" and name == "val" and not _is_split(top, name):
                name = next((other for other in EVALUATION_SPLITS if _is_split(top, other)), name)
            if split == name == "train" and shared and not _is_split(top, name) and _is_unsplit(top):
                name = "."
            names = training.classes if training else classes
            found = find_voc_split(top, name)
            return read_voc(found, names, first_pixel, skip_bad=skip_bad, as_stored=boxes_as_stored)

        super().__init__(read, **options)
        self.root, self.train, self.val, self.test = root, train, val, test
        self.first_pixel, self.boxes_as_stored = first_pixel, boxes_as_stored


def _is_split(top: Path, name: str) -> bool:
    return (top / "ImageSets" / "Main" / f"{name}.txt").is_file() or (top / name).is_dir()
