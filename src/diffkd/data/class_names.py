"""The names and colours of classes, given in code or in a small text, CSV or JSON file."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Color = tuple[int, int, int]
_COLOR = r"(?P<red>\d+)[\s,;]+(?P<green>\d+)[\s,;]+(?P<blue>\d+)"
_NAME_FIRST = re.compile(rf"(?P<name>.*?\S)[\s,;:]+{_COLOR}[\s,;:]*")
_COLOR_FIRST = re.compile(rf"{_COLOR}[\s,;:]+(?P<name>\S.*)")


def class_names(classes: str | Path | Sequence[str], root: Path) -> tuple[str, ...]:
    """Return the names of classes in the order of their ids.

    Args:
        classes: the names, or a text file with one name a line; a relative path is looked for in `root` first. Empty
            lines at its end do not count.
        root: the folder of the data.

    Returns:
        The names.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if there are none, one is empty, or two are equal.
    """
    if isinstance(classes, (str, Path)):
        path = _file(classes, root, "classes")
        source, names = str(path), [line.strip() for line in _text(path).rstrip().splitlines()]
        kind = path.suffix.lower()
        if names and (kind in (".json", ".yaml", ".yml") or (kind == ".csv" and "," in names[0])):
            raise ValueError(f"{source}: no plain list, it begins with {names[0]!r}; give a file with one name a line.")
    else:
        source, names = "classes", [str(name) for name in classes]
    for index, name in enumerate(names):
        if not name:
            raise ValueError(f"{source}: the name of class {index} is empty; give one name for each id, from 0 on.")
        if name in names[:index]:
            raise ValueError(f"{source}: class {name!r} is listed twice, as {names.index(name)} and {index}.")
    if not names:
        raise ValueError(f"{source}: no classes; give one name for each id, from 0 on.")
    return tuple(names)


def class_colors(colors: str | Path | Mapping[str, Sequence[int]], root: Path) -> dict[str, Color]:
    """Return the colour of each class in masks that hold colours.

    Args:
        colors: name to (red, green, blue), 0 to 255; or a file: JSON with such a mapping, or text with a class a line,
            `name, red, green, blue` or `red green blue name`, apart by commas, semicolons, colons or blanks. Lines
            that begin with # and a first line of headings are passed over.
        root: the folder of the data, in which a relative path is looked for first.

    Returns:
        Name to colour, in the order given.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it cannot be understood, or a colour is out of range; names the line.
    """
    if isinstance(colors, Mapping):
        return _checked(list(colors.items()), "colors")
    path = _file(colors, root, "colors")
    text = _text(path)
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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it so.") from error


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
