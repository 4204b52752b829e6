"""The table of a comparison by class: intersection over union of segmentation, one column a method."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PREFIX = "iou/"


def class_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a Markdown table of each class's intersection over union in percent, mean ± std over runs.

    A run in which a class occurs nowhere, neither in masks nor in predictions, does not count for it.

    Args:
        rows: for each method, the last epoch's measurements of its runs.

    Returns:
        The table; empty if nothing was measured by class.

    >>> print(class_table({"alone": [{"iou/car": 0.5}, {"iou/car": 0.7}], "kd": [{"iou/car": 0.625}]}), end="")
    | class | alone | kd |
    | --- | --- | --- |
    | car | 60.0 ± 14.1 | 62.5 |
    """
    names = dict.fromkeys(name for runs in rows.values() for run in runs for name in run if name.startswith(PREFIX))
    if not names:
        return ""
    lines = [["class", *rows], ["---"] * (len(rows) + 1)]
    for name in names:
        values = [[100 * float(run[name]) for run in runs if name in run] for runs in rows.values()]
        lines.append([name.removeprefix(PREFIX), *map(_spread, values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def class_table_of(comparison: Path, methods: Sequence[str], seeds: int) -> str:
    """Return the table of what is finished in the folder of a comparison, as `diffkd compare` leaves it."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for method in methods:
        for seed in range(seeds):
            run = comparison / method / f"seed-{seed}"
            if (run / "result.json").is_file():
                result = json.loads((run / "result.json").read_text(encoding="utf-8"))
                rows.setdefault(method, []).append(result["last"])
    return class_table(rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
