"""File names out of annotation files, which may not lead out of the folder they are for."""

import os
from collections.abc import Iterable
from pathlib import Path, PurePath, PureWindowsPath

from diffkd.data.folder_scan import stay_inside


def enclosed_folder(root: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Return a folder given by its name below a root, or by its absolute path.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is a link that leads out of the root; its absolute path is taken, wherever it is.
    """
    path = Path(root) / folder
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give the name of a folder in {root}, or its absolute path.")
    if not Path(folder).is_absolute() and not path.resolve().is_relative_to(Path(root).resolve()):
        raise ValueError(f"{path}: leads to {path.resolve()}, outside of {root}; give its absolute path instead.")
    return path


def with_slashes(name: str, folder: Path) -> str:
    """Return a name as it is written here, if it was written on Windows and no file in the folder is called so."""
    if "\\" not in name or os.path.lexists(folder / name):
        return name
    return PureWindowsPath(name).as_posix()


def enclosed_files(folder: Path, names: Iterable[str], source: str | os.PathLike[str]) -> list[str]:
    """Return the paths of files named relative to a folder; whether they exist is not asked.

    Args:
        folder: where they are.
        names: their names, such as `a.jpg`, `night/a.jpg` or, written on Windows, `night\\a.jpg`.
        source: who says so, for messages.

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
        # Folders are looked at once and not once per file: there are data sets of a million files.
        parents = [parent for parent in pure.parents if parent not in checked]
        for part in (*reversed(parents), pure):
            try:
                stay_inside(folder / part, root)
            except ValueError as error:
                raise ValueError(f"{source}: file name {name!r}: {error}") from None
        checked.update(parents)
        paths.append(str(folder / pure))
    return paths
