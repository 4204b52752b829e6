"""What a folder of image folders holds: classes, files, and every reason why it cannot be used."""

import os
from pathlib import Path
from typing import NamedTuple

EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


class FolderSamples(NamedTuple):
    """List the images of one split.

    Args:
        paths: N files, ordered by class and then by name.
        labels: N class indices.
    """

    paths: list[str]
    labels: list[int]


class FolderScan(NamedTuple):
    """Hold what a root folder offers: the class names, sorted, and the samples for training and evaluation."""

    classes: tuple[str, ...]
    train: FolderSamples
    val: FolderSamples


def scan_folder(root: str | os.PathLike[str]) -> FolderScan:
    """List `root/train/<class>/...` and `root/val/<class>/...` (or `root/test/...`) and check that they fit together.

    Files are found by extension at any depth below a class folder; hidden ones and those of other kinds are passed
    over.

    Args:
        root: the folder.

    Returns:
        The class names, which are the sorted names of the folders in `train`, and the samples of both splits.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if there are no classes, a class has no image, the classes of the splits differ, or a symbolic link
            leaves the root; names the folder and the mend.
    """
    top = Path(root)
    train = top / "train"
    val = next((top / name for name in ("val", "test") if (top / name).is_dir()), top / "val")
    for folder in (train, val):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder; give a root with train/<class>/*.jpg and val/<class>/*.jpg (or test/)."
            )
    classes, val_classes = _class_names(train), _class_names(val)
    unknown = sorted(set(val_classes) - set(classes))
    missing = sorted(set(classes) - set(val_classes))
    if unknown:
        raise ValueError(f"{val}: class(es) {_some(unknown)} are not in {train}; add images to train or remove them.")
    if missing:
        raise ValueError(
            f"{val}: class(es) {_some(missing)} of {train} are missing; add them or remove them from train."
        )
    real = top.resolve()
    return FolderScan(classes, _samples(train, classes, real), _samples(val, classes, real))


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: no class folders; put the images of each class in a folder of its own.")
    return tuple(names)


def _samples(split: Path, classes: tuple[str, ...], root: Path) -> FolderSamples:
    samples = FolderSamples([], [])
    stay_inside(split, root)
    for label, name in enumerate(classes):
        folder = split / name
        stay_inside(folder, root)
        paths = image_files(folder, root)
        if not paths:
            others = sorted({path.suffix or path.name for path in folder.rglob("*") if path.is_file()})
            found = f"only {_some(others)}" if others else "it is empty"
            raise ValueError(
                f"{folder}: no images, {found}; add images ({', '.join(sorted(EXTENSIONS))}) or remove it."
            )
        samples.paths.extend(paths)
        samples.labels.extend([label] * len(paths))
    return samples


def image_files(folder: Path | str, root: Path) -> list[str]:
    """Return the image files below a folder, sorted; links to files may point anywhere inside the root."""
    paths = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                stay_inside(Path(entry.path), root)
                if entry.is_dir():
                    raise ValueError(
                        f"{entry.path}: a link to a folder inside a class could loop; move the images here."
                    )
            if entry.is_dir():
                paths.extend(image_files(entry.path, root))
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:  # noqa: PTH122 - half the time for a million files
                paths.append(entry.path)
    return paths


def stay_inside(path: Path, root: Path) -> None:
    """Refuse a symbolic link that leads out of a folder; `root` is the folder itself, resolved."""
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise ValueError(f"{path}: a link to {path.resolve()}, outside of {root}; copy the images into the folder.")
