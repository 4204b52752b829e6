"""Tables of a comparison: mean and spread over seeds, paired differences, all measurements, classes."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from diffkd.files.history import measurements
from diffkd.files.weights import write_text

REFERENCES = ("alone", "kd")
"""The methods that every other is compared with."""

# Measurements are float32 shares: differences that agree to so many points differ by rounding alone, and one more image
# of a million counts ten times as much.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Difference:
    """A method against another, seed by seed.

    Attributes:
        mean: mean difference of the last epoch's metric, in its own unit.
        p: two-sided p-value of Student's paired t-test over the common seeds; None with fewer than two, or no spread.
    """

    mean: float
    p: float | None


@dataclass(frozen=True)
class Row:
    """One method's line. Metrics are in percent.

    Attributes:
        method: its name.
        seeds: the seeds that finished.
        last: mean of the metric after the last epoch.
        last_std: its standard deviation over seeds (n - 1 in the denominator); None with one seed.
        best: mean of each seed's best epoch, which is chosen on the set it is measured on and so reads high.
        best_std: its standard deviation.
        against: differences to the student alone and to KD.
        parameters: of the student.
        method_parameters: further parameters that train and are thrown away afterwards.
        seconds: mean duration of a run.
        peak_memory: largest peak of a run's memory, in MiB.
        step_cost: median duration of a training step relative to the reference's, KD's if it is there; None if it was
            not measured.
        step_reference: that reference.
    """

    method: str
    seeds: tuple[int, ...]
    last: float
    last_std: float | None
    best: float
    best_std: float | None
    against: dict[str, Difference]
    parameters: int
    method_parameters: int
    seconds: float
    peak_memory: float
    step_cost: float | None = None
    step_reference: str = ""


def summarize(
    results: Mapping[str, Mapping[int, Mapping[str, Any]]], metric: str, costs: Mapping[str, Any] | None = None
) -> list[Row]:
    """Summarise finished runs.

    Args:
        results: by method and seed, what :func:`~diffkd.training.fit.fit` returns.
        metric: which measurement, a share of 1.
        costs: of a training step, "reference" and "methods", as the file of costs holds them.

    Returns:
        A row per method, in the given order.
    """
    last = {
        method: {seed: 100 * run["last"][metric] for seed, run in sorted(runs.items())}
        for method, runs in results.items()
    }
    rows = []
    for method, runs in results.items():
        if not runs:
            continue
        best = [100 * run["best"][metric] for run in runs.values()]
        rows.append(
            Row(
                method,
                tuple(last[method]),
                statistics.mean(last[method].values()),
                _std(list(last[method].values())),
                statistics.mean(best),
                _std(best),
                {
                    other: difference(last[method], last[other])
                    for other in REFERENCES
                    if other != method and set(last.get(other, ())) & set(last[method])
                },
                next(iter(runs.values()))["parameters"],
                next(iter(runs.values())).get("method_parameters", 0),
                statistics.mean(run["last"]["seconds"] for run in runs.values()),
                max(run.get("peak_memory", math.nan) for run in runs.values()),
                None if costs is None else costs["methods"].get(method, {}).get("median"),
                "" if costs is None else costs["reference"],
            )
        )
    return rows


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Compare two methods over the seeds that both have.

    >>> difference({0: 71.0, 1: 72.0, 2: 73.5}, {0: 70.0, 1: 70.5, 2: 71.0}).mean
    1.6666666666666667
    """
    seeds = sorted(set(ours) & set(theirs))
    deltas = [ours[seed] - theirs[seed] for seed in seeds]
    p = None
    if len(deltas) > 1 and max(deltas) - min(deltas) > _ROUNDING:
        p = float(stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds]).pvalue)
    return Difference(statistics.mean(deltas), p)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON holds them."""
    return [asdict(row) for row in rows]


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head, *body = cells(rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_latex(rows: Sequence[Row]) -> str:
    """Return the rows as a LaTeX tabular."""
    escaped = [[_latex(cell) for cell in line] for line in cells(rows)]
    lines = [f"{' & '.join(line)} \\\\" for line in escaped]
    columns = "l" + "r" * (len(escaped[0]) - 1)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\hline",
            lines[0],
            r"\hline",
            *lines[1:],
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    )


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table as text, the head first.

    Accuracies are in percent, mean ± standard deviation; differences in points, with the p-value; then the student's
    parameters, those that only train along, seconds per run, and peak memory.
    """
    references = [other for other in REFERENCES if any(other in row.against for row in rows)]
    head = ["method", "n", "last epoch", "best epoch", *(f"vs {other} (p)" for other in references)]
    head += ["parameters", "+ training", "s", "MiB"]
    measured = next((row.step_reference for row in rows if row.step_cost is not None), None)
    if measured is not None:
        head.append(f"step / {measured}")
    body = [
        [
            row.method,
            str(len(row.seeds)),
            _spread(row.last, row.last_std),
            _spread(row.best, row.best_std),
            *(_against(row.against.get(other)) for other in references),
            f"{row.parameters:,}",
            f"{row.method_parameters:,}",
            f"{row.seconds:.0f}",
            "-" if math.isnan(row.peak_memory) else f"{row.peak_memory:.0f}",
            *([] if measured is None else ["-" if row.step_cost is None else f"{row.step_cost:.2f}"]),
        ]
        for row in rows
    ]
    return [head, *body]


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _spread(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def _against(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    p = "" if difference.p is None else f" ({difference.p:.2g})"
    return f"{difference.mean:+.2f}{p}"


def _latex(cell: str) -> str:
    return cell.replace("%", r"\%").replace("±", r"$\pm$").replace("_", r"\_")


Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
Spread = dict[str, float | int | None]


def summarize_all(results: Results) -> dict[str, dict[str, Spread]]:
    """Return for each method and measurement the mean over its seeds, their standard deviation, and their number.

    Args:
        results: by method and seed, what :func:`~diffkd.training.fit.fit` returns.

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
        lines.append([name.removeprefix(PREFIX), *map(_spread_of, values)])
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


def _spread_of(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
