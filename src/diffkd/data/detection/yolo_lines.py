"""The lines of a YOLO label file: boxes, polygons, and boxes with key points."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

Corners = tuple[float, float, float, float]

# Long lines are read as boxes with key points if at least this share of them can be.
_MOST = 0.9
BOX_OR_POLYGON = "write class, x, y, width, height, or a class and a polygon."


class YoloLine(NamedTuple):
    """One parsed line; corners are left, top, right, bottom in fractions of the image.

    Args:
        label: the class, from 0.
        box: the box given by its first four numbers.
        polygon: the bounding box of all its points; None if the line is only a box, or not a polygon.
        numbers: count of numbers after the class.
    """

    label: int
    box: Corners
    polygon: Corners | None
    numbers: int


@dataclass
class LongLines:
    """Counts over the long lines of a split that distinguish boxes with key points from polygons.

    A polygon of k corners and a box with key points may have the same count of numbers. With key points all lines have
    the same length, the box lies in the image, and nearly all points lie in the box.

    Attributes:
        lengths: number of lines by count of numbers after the class; at most a thousand different counts.
        with_points: number of lines that can be read as a box with key points.
        rotated: number of lines that are four corners of a rectangle.
    """

    lengths: dict[int, int] = field(default_factory=dict)
    with_points: int = 0
    rotated: int = 0

    def count(self, values: list[float]) -> None:
        """Count a line."""
        if len(values) in self.lengths or len(self.lengths) < 1000:
            self.lengths[len(values)] = self.lengths.get(len(values), 0) + 1
        self.with_points += _holds_points(values, 2) or _holds_points(values, 3)
        self.rotated += len(values) == 8 and _is_parallelogram(values)

    @property
    def share(self) -> float:
        """Return the share of the lines that can be read as boxes with key points, 0 if their lengths vary."""
        total = sum(self.lengths.values())
        if not total or max(self.lengths.values()) < _MOST * total or self.rotated >= _MOST * total:
            return 0.0
        return self.with_points / total

    @property
    def are_points(self) -> bool:
        """Return whether the lines are boxes with key points rather than polygons."""
        return self.share >= _MOST


def parse_line(line: str, classes: int, points: tuple[int, int] | None) -> tuple[YoloLine, list[float]]:
    """Read a line.

    Args:
        line: `class x y width height`, optionally followed by key points, or `class x1 y1 x2 y2 ...` for a polygon.
        classes: number of classes.
        points: number of key points and of values per key point, if known.

    Returns:
        The parsed line, and the numbers after the class.

    Raises:
        ValueError: if it is malformed; the text begins with a verb, to follow the line's location in a message.
    """
    words = line.split()
    if "," in line:
        raise ValueError(f"is {_short(line)}, with commas; write numbers with a point, and blanks between them.")
    count = len(words) - 1
    expected = None if points is None else 4 + points[0] * points[1]
    if expected is not None and count not in (4, expected):
        raise ValueError(
            f"has {len(words)} numbers; with kpt_shape {list(points or ())} write class, x, y, width, height, and "
            f"{expected - 4} numbers of key points."
        )
    try:
        number, values = float(words[0]), [float(word) for word in words[1:]]
        if not number.is_integer():
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"is {_short(line)}; write a whole number and then fractions.") from None
    is_polygon = count >= 6 and count % 2 == 0
    if count != 4 and expected is None and not is_polygon and not _holds_points(values, 3):
        why = ", as boxes with a confidence or a track have" if count == 5 else ""
        raise ValueError(f"has {len(words)} numbers{why}; {BOX_OR_POLYGON}")
    label = int(number)
    if not 0 <= label < classes:
        raise ValueError(f"is of class {label}; there are 0 to {classes - 1}.")
    fractions = values if expected is None and is_polygon else values[:4]
    if all(map(math.isfinite, fractions)) and max(map(abs, fractions)) > 2:
        raise ValueError(f"is {_short(line)}, which are pixels; write fractions of the image's width and height.")
    x, y, width, height = values[:4]
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    polygon = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])) if is_polygon else None
    return YoloLine(label, box, polygon, count), values


def _short(line: str) -> str:
    line = " ".join(line.split())
    return repr(line if len(line) <= 80 else f"{line[:77]}...")


def _holds_points(values: list[float], numbers: int) -> bool:
    """Return whether values can be a box and key points of two or three numbers each."""
    points, rest = divmod(len(values) - 4, numbers)
    if points < 1 or rest:
        return False
    x, y, width, height = values[:4]
    slack = 0.02
    inside_image = (
        0 < width <= 1 + slack
        and 0 < height <= 1 + slack
        and -slack <= x - width / 2
        and x + width / 2 <= 1 + slack
        and -slack <= y - height / 2
        and y + height / 2 <= 1 + slack
    )
    if not inside_image:
        return False
    inside = 0
    for start in range(4, len(values), numbers):
        px, py = values[start : start + 2]
        if numbers == 3 and values[start + 2] not in (0, 1, 2):
            return False
        unseen = (px, py) == (0, 0)
        inside += unseen or (abs(px - x) <= 0.6 * width and abs(py - y) <= 0.6 * height)
    return inside >= _MOST * points


def _is_parallelogram(values: list[float]) -> bool:
    return all(abs(values[i] + values[i + 4] - values[i + 2] - values[i + 6]) < 0.01 for i in (0, 1))
