"""Every measurement of a comparison's last epochs side by side, such as AP by size of the objects."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffkd.tasks.history import measurements
from diffkd.weights import write_text

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
Spread = dict[str, float | int | None]


def summarize_all(results: Results) -> dict[str, dict[str, Spread]]:
    """Return for each method and measurement the mean over its seeds, their standard deviation, and their number.

    Args:
        results: by method and seed, what :func:`~diffkd.tasks.fit.fit` returns.

    Returns:
        By method and name of the measurement {"mean", "std", "n"}, as shares of 1; "std" (n - 1 in the denominator) is
        None with one seed. A measurement that some seeds lack, such as AP of sizes that do not occur, counts those that
        have it.

    >>> runs = {0: {"last": {"epoch": 1, "ap": 0.5}}, 1: {"last": {"epoch": 1, "ap": 0.25}}}
    >>> summarize_all({"alone": runs})["alone"]["ap"]["mean"]
    0.375
    """
    summary: dict[str, dict[str, Spread]] = {}
    for method, runs in results.items():
        rows = [measurements(run["last"]) for _, run in sorted(runs.items())]
        names = dict.fromkeys(name for row in rows for name in row)
        values = {name: [float(row[name]) for row in rows if name in row] for name in names}
        summary[method] = {
            name: {
                "mean": statistics.mean(found),
                "std": statistics.stdev(found) if len(found) > 1 else None,
                "n": len(found),
            }
            for name, found in values.items()
        }
    return summary


def write_all_measurements(out: Path, results: Results) -> None:
    """Write `measurements.json` and `measurements.md` into `out`; in the table shares are in percent."""
    summary = summarize_all(results)
    write_text(out / "measurements.json", json.dumps(summary, indent=2) + "\n")
    names = list(dict.fromkeys(name for found in summary.values() for name in found))
    lines = [["method", *names], ["---"] * (1 + len(names))]
    lines += [[method, *(_cell(name, found.get(name)) for name in names)] for method, found in summary.items()]
    write_text(out / "measurements.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))


def _cell(name: str, spread: Spread | None) -> str:
    if spread is None:
        return "-"
    factor, digits = (1, 4) if name == "loss" else (100, 2)
    mean, std = spread["mean"], spread["std"]
    assert mean is not None
    text = f"{factor * mean:.{digits}f}"
    return text if std is None else f"{text} ± {factor * std:.{digits}f}"
