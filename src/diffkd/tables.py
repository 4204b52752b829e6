"""Tables of a comparison: mean and spread over seeds, paired differences, as text, JSON, Markdown or LaTeX."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

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
        results: by method and seed, what :func:`~diffkd.tasks.fit.fit` returns.
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
