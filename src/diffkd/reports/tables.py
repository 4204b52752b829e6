"""Tables of a comparison: mean ± std over seeds, paired differences, all measurements, per-class IoU."""

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
"""The methods that all others are compared with."""

# In percentage points. Measurements are float32: differences that agree this closely differ only by rounding; one image
# in a million changes accuracy by ten times as much.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Difference:
    """Paired difference between two methods over common seeds.

    Attributes:
        mean: mean difference of the last epoch's metric, in the metric's unit.
        p: two-sided p-value of Student's paired t-test over the common seeds; None with fewer than two seeds or zero
            variance.
    """

    mean: float
    p: float | None


@dataclass(frozen=True)
class Row:
    """One method's row of the table. Metrics are in percent.

    Attributes:
        method: name of the method.
        seeds: the seeds that finished.
        last: mean of the metric after the last epoch.
        last_std: its standard deviation over seeds (n - 1 in the denominator); None with one seed.
        best: mean of each seed's best epoch; biased upwards, since the epoch is chosen on the set it is evaluated on.
        best_std: its standard deviation.
        against: differences to the student trained alone and to KD.
        parameters: number of parameters of the student.
        method_parameters: number of further trainable parameters, discarded after training.
        seconds: mean duration of a run.
        peak_memory: largest peak of a run's memory, in MiB.
        step_cost: median duration of a training step relative to the reference method's, KD if included; None if not
            measured.
        step_reference: the reference method.
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
        results: by method and seed, the result of :func:`~diffkd.training.fit.fit`.
        metric: name of the measurement, whose values are in [0, 1].
        costs: costs of a training step, "reference" and "methods", as in the file of costs.

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
    """Return the rows as JSON-serialisable mappings."""
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
    """Return the cells of the table as text, header first.

    Accuracies are in percent, mean ± standard deviation; differences in points, with the p-value; then the student's
    parameters, the additional trainable parameters, seconds per run, and peak memory.
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
    """Return mean, standard deviation and count over seeds for each method and measurement.

    Args:
        results: by method and seed, the result of :func:`~diffkd.training.fit.fit`.

    Returns:
        By method and name of the measurement {"mean", "std", "n"}, in [0, 1]; "std" (n - 1 in the denominator) is None
        with one seed. For a measurement that some seeds lack, such as AP of absent sizes, only the seeds with a value
        count.

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
    """Write `measurements.json` and `measurements.md` into `out`; the table is in percent."""
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
    """Return a Markdown table of per-class IoU in percent, mean ± standard deviation over runs.

    A run without a class in masks and predictions is not counted for that class.

    Args:
        rows: for each method, the last epoch's measurements of its runs.

    Returns:
        The table; empty if there are no per-class measurements.

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
    """Return the per-class table of the finished runs in the output folder of `diffkd compare`."""
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


def cost_tables(found: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Return the tables of `diffkd profile` as text by title, header first.

    Args:
        found: the result of :func:`~diffkd.inference.cost.measure_costs`.
    """
    size = "x".join(map(str, found["image_size"]))
    models = found["models"]
    kinds = list(dict.fromkeys(kind for cost in models.values() for kind in cost["files"]))
    sizes = [["", "model", "parameters", "multiply-adds", *(f"{kind}, MiB" for kind in kinds)]]
    for name, cost in models.items():
        files = [f"{cost['files'][kind] / 2**20:.2f}" if kind in cost["files"] else "-" for kind in kinds]
        sizes.append([name, cost["model"], f"{cost['parameters']:,}", f"{cost['multiply_adds']:,}", *files])
    times = [["model", "runtime", "batch", "threads", "ms", "quartiles", "images/s"]]
    for one in found["timings"]:
        times.append(
            [
                one["model"],
                one["runtime"],
                str(one["batch"]),
                str(one["threads"] or "-"),
                f"{one['median']:.2f}",
                f"{one['low']:.2f} - {one['high']:.2f}",
                f"{one['images_per_second']:.1f}",
            ]
        )
    return {f"Images {size}": sizes, f"Time of a pass on {found['device']}": times}
