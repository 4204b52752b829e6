"""Folder scanning: class folders and their images, split folders, and checks that paths stay inside a folder."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePath, PureWindowsPath
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_warn


def absent_classes(labels: Iterable[int], classes: Sequence[str]) -> list[str]:
    """Return the names of the classes that have no label, in class order.

    >>> absent_classes([0, 2, 2], ["cat", "dog", "bird"])
    ['dog']
    """
    present = set(labels)
    return [name for label, name in enumerate(classes) if label not in present]


_SPELLED_OUT = 5


def format_names(names: Sequence[object]) -> str:
    """Return names joined for a message; of more than five, the first five and the count of the rest.

    >>> format_names("abcdefg")
    "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    more = f" and {len(names) - _SPELLED_OUT} more" if len(names) > _SPELLED_OUT else ""
    return ", ".join(map(repr, names[:_SPELLED_OUT])) + more


EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


# Folder names of the evaluation split; the first that exists is used. Roboflow exports both "valid" and "test".
EVALUATION_SPLITS = ("val", "valid", "validation", "test")


class FolderSamples(NamedTuple):
    """The images of one split.

    Args:
        paths: N files, ordered by class and then by name.
        labels: N class indices.
    """

    paths: list[str]
    labels: list[int]

    def select(self, indices: Iterable[int]) -> "FolderSamples":
        """Return some of the samples, in the given order."""
        chosen = list(indices)
        return FolderSamples([self.paths[index] for index in chosen], [self.labels[index] for index in chosen])


class FolderScan(NamedTuple):
    """The content of a root folder: sorted class names, training samples and evaluation samples."""

    classes: tuple[str, ...]
    train: FolderSamples
    val: FolderSamples


def evaluation_split(root: Path, folder: str = "{split}") -> str:
    """Return the name of the evaluation split's folder, "val" if none of the usual names exists.

    Args:
        root: the folder of the data.
        folder: path of a split's folder below the root; "{split}" is replaced by the split's name.
    """
    return next((name for name in EVALUATION_SPLITS if (root / folder.replace("{split}", name)).is_dir()), "val")


def scan_folder(
    root: str | os.PathLike[str],
    *,
    train: bool = True,
    val: bool = True,
    known: Sequence[str] = (),
    in_root: bool = False,
) -> FolderScan:
    """List `root/train/<class>/...` and `root/val/<class>/...` (or `valid`, `validation`, `test`) and check them.

    Files are found by extension at any depth below a class folder; hidden files are ignored; other kinds of files and
    images outside the class folders are ignored with a warning. A class may have no evaluation images.

    Args:
        root: the folder.
        train: whether to scan training images; if False, the evaluation images are used in their place, which may lack
            classes, and may be in class folders of the root itself.
        val: whether to scan evaluation images.
        known: names of all classes, for evaluation images of some of them; () if they are unknown.
        in_root: the class folders of the training images are in the root itself, not in `root/train`.

    Returns:
        The class names, which are the sorted names of the folders in `train`, and the samples of both splits.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if there are no classes, a class has no training image, no class has an evaluation image, `val` has
            classes that `train` lacks, or a symbolic link leaves the root; the message names the folder and the fix.
    """
    top = Path(root)
    evaluated = top / evaluation_split(top)
    if not train and not evaluated.is_dir() and top.is_dir():
        inside = {path.name for path in top.iterdir() if path.is_dir() and not path.name.startswith(".")}
        evaluated = top if inside and inside <= set(known) else evaluated
    learned = (top if in_root else top / "train") if train else evaluated
    splits = tuple(dict.fromkeys((learned, evaluated) if val else (learned,)))
    for folder in splits:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder; give a root with train/<class>/*.jpg and val/<class>/*.jpg (or "
                f"{', '.join(f'{name}/' for name in EVALUATION_SPLITS[1:])})"
                + ("." if folder == learned else ", or set val_share=0.1 to hold some of train back.")
            )
    classes = _class_names(learned)
    classes = tuple(known) if set(classes) <= set(known) else classes
    if val:
        _check_known(evaluated, classes, learned)
    real = top.resolve()
    others: Counter[str] = Counter()
    held = _samples(evaluated, classes, real, others) if val else FolderSamples([], [])
    scan = FolderScan(classes, _samples(learned, classes, real, others), held)
    empty = absent_classes(scan.train.labels, classes)
    if empty and train:
        raise ValueError(f"{learned}: no images of class(es) {format_names(empty)}, {_contents(learned / empty[0])}")
    if (val and not scan.val.paths) or not scan.train.paths:
        raise ValueError(f"{evaluated}: no images, {_contents(evaluated)}")
    for split in splits:
        _warn_of_loose(split)
    _warn_of_others(top, others)
    return scan


# Folders in a root that are no classes, but parts of another layout.
_SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing", "eval")
_PART_NAMES = ("images", "imgs", "img", "labels", "masks", "annotations", "annots")
_NO_CLASSES = frozenset((*_SPLIT_NAMES, *_PART_NAMES))


def class_folders(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the sorted names of the class folders in a root without splits, `root/<class>/*.jpg`; () if it is no such.

    There must be two folders or more, none with a name such as `train`, `test`, `images` or `labels`, and none that
    holds other folders but no image.

    Args:
        root: the folder.
    """
    top = Path(root)
    if not top.is_dir():
        return ()
    folders = sorted(path for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2 or any(path.name.lower() in _NO_CLASSES for path in folders):
        return ()
    images = [_holds_image(folder) for folder in folders]
    deeper = any(
        not held and any(one.is_dir() for one in path.iterdir()) for path, held in zip(folders, images, strict=True)
    )
    return tuple(path.name for path in folders) if any(images) and not deeper else ()


def _holds_image(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_is_image(entry.name) for entry in entries)


def scan_test(root: str | os.PathLike[str], classes: Sequence[str]) -> FolderSamples | None:
    """List `root/test/<class>/...` and check it as :func:`scan_folder` checks the evaluation images.

    Args:
        root: the folder.
        classes: names of the classes in the order of their labels.

    Returns:
        The samples; None if no folder in `test` has the name of a class, as in a test set without labels.

    Raises:
        ValueError: if only some of the folders have names of classes, no class has an image, or a symbolic link leaves
            the root.
    """
    top = Path(root)
    split = top / "test"
    if not split.is_dir():
        return None
    if not any((split / name).is_dir() for name in classes):
        rank_zero_warn(
            f"{split}: passed over as a test set without labels, since no folder in it has the name of a class, such "
            f"as {classes[0]!r}."
        )
        return None
    _check_known(split, classes, top / "train")
    others: Counter[str] = Counter()
    samples = _samples(split, tuple(classes), top.resolve(), others)
    if not samples.paths:
        raise ValueError(f"{split}: no images, {_contents(split)}")
    _warn_of_loose(split)
    _warn_of_others(top, others)
    return samples


def _check_known(split: Path, classes: Sequence[str], learned: Path) -> None:
    unknown = sorted(set(_class_names(split)) - set(classes))
    if unknown:
        raise ValueError(
            f"{split}: class(es) {format_names(unknown)} are not in {learned}; add images to train or remove them."
        )


def _warn_of_loose(split: Path) -> None:
    loose = sorted(path.name for path in split.iterdir() if _is_image(path.name) and path.is_file())
    if loose:
        rank_zero_warn(
            f"{split}: {len(loose)} image(s) beside the class folders are of no class and passed over "
            f"({format_names(loose)}); move them into the folder of their class."
        )


def _warn_of_others(top: Path, others: Counter[str]) -> None:
    if others:
        rank_zero_warn(
            f"{top}: {others.total()} file(s) are passed over, whose names are not those of images "
            f"({format_names(sorted(others))}); save images as .png or .jpg."
        )


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: no class folders; put the images of each class in a folder of its own.")
    return tuple(names)


def _contents(folder: Path) -> str:
    """Describe what a folder contains instead of images, and how to fix it."""
    others = sorted({_kind(path) for path in folder.rglob("*") if path.is_file()})
    found = f"{folder} holds only {format_names(others)}" if others else f"{folder} is empty"
    return f"{found}; add images ({', '.join(sorted(EXTENSIONS))}) or remove the folder."


def _kind(path: Path) -> str:
    return "hidden files" if path.name.startswith(".") else path.suffix or path.name


def _samples(split: Path, classes: tuple[str, ...], root: Path, others: Counter[str]) -> FolderSamples:
    samples = FolderSamples([], [])
    check_inside(split, root)
    for label, name in enumerate(classes):
        folder = split / name
        check_inside(folder, root)
        paths = image_files(folder, root, others) if folder.is_dir() else []
        samples.paths.extend(paths)
        samples.labels.extend([label] * len(paths))
    return samples


def image_files(
    folder: Path | str,
    root: Path,
    others: Counter[str] | None = None,
    extensions: frozenset[str] = EXTENSIONS,
) -> list[str]:
    """Return the image files below a folder, sorted; links to files may point anywhere inside the root.

    Args:
        folder: where to look, at any depth.
        root: the folder that no link may leave.
        others: counter that receives the extensions of ignored files, except hidden ones.
        extensions: of the files to return.
    """
    paths = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                check_inside(Path(entry.path), root)
                if entry.is_dir() and (not _FOLLOWS_LINKS.get() or _loops(Path(entry.path))):
                    raise ValueError(
                        f"{entry.path}: a link to a folder inside a class could loop; move the images here."
                    )
            if entry.is_dir():
                paths.extend(image_files(entry.path, root, others, extensions))
                continue
            if _extension(entry.name) in extensions:
                if not entry.is_symlink() and not entry.is_file(follow_symlinks=False):
                    raise ValueError(f"{entry.path}: a pipe, socket or device, and no image; remove it.")
                paths.append(entry.path)
            elif others is not None:
                others[_extension(entry.name) or entry.name] += 1
    return paths


def _loops(link: Path) -> bool:
    """Return whether a link to a folder points to one of its own parent folders."""
    return link.parent.resolve().is_relative_to(link.resolve())


def _is_image(name: str) -> bool:
    return _extension(name) in EXTENSIONS and not name.startswith(".")


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - half the time for a million files


_FOLLOWS_LINKS = ContextVar("follows_links", default=False)


@contextmanager
def allow_outside_links(follow: bool) -> Iterator[None]:
    """Within this context, allow symbolic links out of the data folder; names with `..` are still refused."""
    token = _FOLLOWS_LINKS.set(follow)
    try:
        yield
    finally:
        _FOLLOWS_LINKS.reset(token)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a file of a name from a file; of one that is too long for any there is none."""
    return os.path.isfile(path)  # noqa: PTH113 - where pathlib raises OSError


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a folder of a name from a file, likewise."""
    return os.path.isdir(path)  # noqa: PTH112


def is_there(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a file or folder of a name from a file, likewise."""
    return os.path.exists(path)  # noqa: PTH110


def check_inside(path: Path, root: Path) -> None:
    """Raise ValueError for a symbolic link that leads out of the folder `root`, which must be resolved."""
    if os.path.islink(path) and leads_outside(path, root):  # noqa: PTH114 - pathlib fails for names that are too long
        raise ValueError(
            f"{path}: a link to {path.resolve()}, outside of {root}; copy the images into the folder, or set "
            "follow_links=true where you trust its links."
        )


def leads_outside(path: Path, root: Path, *, named: str | os.PathLike[str] = "") -> bool:
    """Return whether a path leads out of a resolved folder, by its name or by a link that may not be followed.

    Args:
        path: the path.
        root: the folder.
        named: the name from which the path was made; if it is absolute or contains `..`, links may not be followed
            either.
    """
    name = Path(named)
    followed = _FOLLOWS_LINKS.get() and ".." not in name.parts and not name.is_absolute()
    return not followed and not path.resolve().is_relative_to(root)


def enclosed_folder(root: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder, given by its name below a root or by its absolute path.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is a link that leads out of the root; an absolute path is accepted anywhere.
    """
    path = Path(root) / folder
    if not is_folder(path):
        raise FileNotFoundError(f"{path}: no such folder; give the name of a folder in {root}, or its absolute path.")
    if not Path(folder).is_absolute() and leads_outside(path, Path(root).resolve(), named=folder):
        raise ValueError(f"{path}: leads to {path.resolve()}, outside of {root}; give its absolute path instead.")
    return path


def read_text(file: Path) -> str:
    """Return the content of a text file in UTF-8, without a byte order mark.

    Raises:
        ValueError: if it is in another encoding; names the file.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no text in UTF-8 ({error}); save it as UTF-8.") from error


def with_slashes(name: str, folder: Path) -> str:
    """Replace backslashes of a Windows path by slashes, unless a file in the folder has exactly this name."""
    if "\\" not in name or os.path.lexists(folder / name):
        return name
    return PureWindowsPath(name).as_posix()


def enclosed_files(folder: Path, names: Iterable[str], source: str | os.PathLike[str]) -> list[str]:
    """Return the paths of files named relative to a folder, without checking that they exist.

    Args:
        folder: where they are.
        names: their names, such as `a.jpg`, `night/a.jpg` or, written on Windows, `night\\a.jpg`.
        source: the file that lists the names, for messages.

    Raises:
        ValueError: if a name is empty or absolute, holds `..` or a null character, or is a link that leads out of the
            folder; quotes the name.
    """
    root = folder.resolve()
    checked: set[PurePath] = set()
    paths = []
    for name in names:
        pure = PurePath(with_slashes(name, folder))
        drive = "\\" in name and PureWindowsPath(name).drive
        if not pure.parts or pure.is_absolute() or drive or ".." in pure.parts or "\0" in name:
            raise ValueError(f"{source}: file name {name!r} is no file inside {folder}; write names relative to it.")
        # Each folder is checked once, not once per file: data sets can have a million files.
        parents = [parent for parent in pure.parents if parent not in checked]
        for part in (*reversed(parents), pure):
            try:
                check_inside(folder / part, root)
            except ValueError as error:
                raise ValueError(f"{source}: file name {name!r}: {error}") from None
        checked.update(parents)
        paths.append(str(folder / pure))
    return paths
