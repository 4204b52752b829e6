"""The table of a distiller's pairs, as text."""

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from diffkd.matching import Pair
from diffkd.reader import Reader

HEADER = ("pair", "student layer", "shape", "teacher layer", "shape", "method", "parameters")


def unique_names(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return a name for each pair: its own, or that of its student's layers; numbered from the second of a kind on."""
    wanted = [pair.name or ",".join(pair.student_names) for pair in pairs]
    count: Counter[str] = Counter()
    names = []
    for name in wanted:
        count[name] += 1
        names.append(name if count[name] == 1 else f"{name}#{count[name]}")
    return tuple(names)


def pair_rows(
    names: Sequence[str], readers: Sequence[tuple[Reader, Reader]], methods: Sequence[nn.Module]
) -> Iterator[tuple[str, ...]]:
    """Yield one row per pair, with the columns of :data:`HEADER`."""
    for name, (ours, theirs), method in zip(names, readers, methods, strict=True):
        parameters = f"{sum(p.numel() for p in method.parameters()):,}"
        yield (
            name,
            ", ".join(ours.names),
            str(ours),
            ", ".join(theirs.names),
            str(theirs),
            type(method).__name__,
            parameters,
        )


def as_text(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    """Return `title` and the rows below their header, in columns of even width."""
    table = [HEADER, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, *lines])
