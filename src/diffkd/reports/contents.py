"""What the page of a run, and that of a comparison, consists of."""

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from diffkd.files.history import Row, measurements, read_csv
from diffkd.files.run_folder import RunFolder
from diffkd.reports.html_page import PageTable, Picture, Pictures, Plot, Section, lines_plot, plain
from diffkd.reports.mistakes import Mistakes, confused, recalls
from diffkd.reports.tables import PREFIX, cost_tables

_MOST_CLASSES = 60  # of a confusion matrix
_LONGEST = 16  # characters of a name at its axes


def run_sections(
    folder: RunFolder, figures: Sequence[Path], mistakes: Mistakes | None, classes: Sequence[str]
) -> tuple[str, list[Section]]:
    """Return the headline of a run, and the sections of its page.

    Args:
        folder: the run, of at least one epoch.
        figures: PNG files of what student, denoised student and teacher see.
        mistakes: what the student gets wrong; None if that was not looked at.
        classes: names of the classes.

    Raises:
        ValueError: if a file of the run is damaged.
    """
    rows = read_csv(folder.metrics)
    config = _yaml(folder.config)
    result = _json(folder.result) if folder.result.is_file() else {}
    score = str(
        result.get("score") or next((name for name in ("top1", "map", "ap", "miou") if name in rows[-1]), "loss")
    )
    best = result.get("best") or max(rows, key=lambda row: row.get(score, -1.0))
    sections = [
        Section("Results", tables=[_measured(rows[-1], best), _facts(config, result, rows[-1])]),
        Section("Course", plots=_course(rows, score)),
        _balance(rows, result.get("pulls") or {}),
        _seen(figures),
        *_mistakes(mistakes, classes, rows[-1]),
        _cost(folder.path / "profile.json"),
        _samples(folder.path / "samples"),
        _recipe(folder.config, result),
    ]
    state = "" if result else ", not finished"
    headline = f"{score}: {_percent(score, rows[-1].get(score))} after the last epoch ({len(rows)}{state}), "
    return headline + f"{_percent(score, best.get(score))} at best", sections


def comparison_sections(folder: Path) -> tuple[str, list[Section]]:
    """Return the headline of a comparison, and the sections of its page.

    Args:
        folder: the output of `diffkd compare`.

    Raises:
        ValueError: if a file is damaged.
    """
    facts = _json(folder / "comparison.json")
    rows, score = facts["rows"], str(facts["metric"])
    runs = {
        row["method"]: [RunFolder(folder / row["method"] / f"seed-{seed}") for seed in row["seeds"]] for row in rows
    }
    courses = {method: [read_csv(run.metrics) for run in found] for method, found in runs.items()}
    first = next(run for found in runs.values() for run in found)
    result = _json(first.result)
    leader = max(rows, key=lambda row: row["last"])
    tables = [_comparison(rows, score, facts.get("step_cost"))]
    if (folder / "measurements.json").is_file():
        tables.append(_all_measurements(_json(folder / "measurements.json")))
    losses = [
        lines_plot(f"{method}, seed {row['seeds'][0]}", _curves(courses[method][0], "train/"), "training loss")
        for method, row in zip(courses, rows, strict=True)
    ]
    gammas = {
        f"{method}: {name}": points
        for method, found in courses.items()
        for name, points in _curves(found[0], "gamma/").items()
    }
    sections = [
        Section("Results", tables=tables),
        Section("Course", plots=[_spread_plot(courses, score)]),
        Section("Losses by term", plots=losses),
        Section("Gamma", plots=[lines_plot("gamma, mean of the first seed", gammas, "gamma")] if gammas else []),
        _classes_of(courses),
        _pictures_of(folder),
        Section("Recipe", tables=[_about(result)], texts=_texts(first.config, result)),
    ]
    count = len(rows)
    headline = f"{count} methods; best after the last epoch: {leader['method']}, {score} {leader['last']:.2f} %"
    return headline, sections


def _measured(last: Row, best: Mapping[str, Any]) -> PageTable:
    names = [name for name in measurements(last) if not name.startswith((PREFIX, "weight/"))]
    rows = [[name, _percent(name, last[name]), _percent(name, best.get(name))] for name in names]
    return PageTable(["measurement", "last epoch", f"best epoch ({int(best.get('epoch', 0))})"], rows)


def _facts(config: Mapping[str, Any], result: Mapping[str, Any], last: Row) -> PageTable:
    rows = [
        [name, _short(config[name])]
        for name in ("student", "teacher", "teacher_weights", "method", "data")
        if config.get(name)
    ]
    for name in ("task", "parameters", "method_parameters", "device", "seed", "finished"):
        if result.get(name) is not None:
            value = result[name]
            rows.append([name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)])
    if result.get("peak_memory") is not None:
        rows.append(["peak memory", f"{result['peak_memory']:.0f} MiB"])
    rows.append(["training time", f"{last.get('seconds', 0.0):.0f} s"])
    return PageTable(["", ""], rows, words=(0, 1))


def _course(rows: Sequence[Row], score: str) -> list[Plot]:
    names = [name for name in measurements(rows[-1]) if not name.startswith((PREFIX, "weight/")) and name != "loss"]
    scores = {name: _points(rows, name, 100) for name in names if len(names) <= 6 or name.startswith(score)}
    plots = [lines_plot("measurements", scores, "%")]
    losses = _curves(rows, "train/")
    positive = all(value > 0 for points in losses.values() for _, value in points)
    plots.append(lines_plot("training losses by term", losses, "loss", log=positive))
    if any("loss" in row for row in rows):
        plots.append(lines_plot("evaluation loss", {"loss": _points(rows, "loss")}, "loss"))
    for title, prefix in (("gamma", "gamma/"), ("weights of the balance", "weight/")):
        if found := _curves(rows, prefix):
            plots.append(lines_plot(f"{title}, mean of an epoch", found, title))
    plots.append(lines_plot("learning rate", {"lr": _points(rows, "lr")}, "lr"))
    return plots


def _balance(rows: Sequence[Row], pulls: Mapping[str, float]) -> Section:
    lines = ["Norm of the gradient of each pair at the student's layer in the first step, in that of the task's loss."]
    table = PageTable(["pair", "ratio"], [[pair, f"{pull:.3g}"] for pair, pull in pulls.items()])
    return Section("Gradient balance", lines=lines, tables=[table]) if pulls else Section("Gradient balance")


def _seen(figures: Sequence[Path]) -> Section:
    pictures = [Picture(path.read_bytes(), path.stem) for path in figures]
    return Section("What student and teacher see", pictures=[Pictures(pictures, wide=True)] if pictures else [])


def _mistakes(found: Mistakes | None, classes: Sequence[str], last: Row) -> list[Section]:
    overlaps = [
        [name.removeprefix(PREFIX), f"{100 * value:.2f}"] for name, value in last.items() if name.startswith(PREFIX)
    ]
    by_class = Section("IoU by class", tables=[PageTable(["class", "IoU, %"], overlaps)] if overlaps else [])
    if found is None:
        return [by_class]
    names = [*classes, "nothing"] if len(found.confusion) > len(classes) else list(classes)
    whole = "all" if found.complete else "the first"
    lines = [f"On {whole} {found.images} evaluation images, with the student after the last epoch."]
    pictures = [Picture(_png(picture), line) for picture, line in found.worst]
    wide = bool(found.worst) and found.worst[0][0].width > 400
    return [
        Section("Worst images", lines=lines, pictures=[Pictures(pictures, wide=wide)])
        if pictures
        else Section("Worst images"),
        _found_by_class(found.confusion, names) if found.confusion.ndim == 3 else _confused(found.confusion, names),
        by_class,
    ]


def _confused(confusion: Tensor, names: Sequence[str]) -> Section:
    rows = [
        [true, taken, f"{number:,}", f"{100 * share:.1f}"] for true, taken, number, share in confused(confusion, names)
    ]
    head = ["true class", "taken for", "count", "% of the class"]
    return Section(
        "Confused classes",
        tables=[PageTable(head, rows, words=(0, 1))] if rows else [],
        plots=[_matrix(confusion, names)] if len(names) <= _MOST_CLASSES else [],
    )


def _found_by_class(confusion: Tensor, names: Sequence[str]) -> Section:
    """Return the counts of images that may have several classes, by class; of `Mistakes.confusion` (K, 2, 2)."""
    rows = [
        [name, *(f"{number:,}" for number in (missed + found, found, missed, wrong))]
        for name, ((_, wrong), (missed, found)) in zip(names, confusion.tolist(), strict=True)
    ]
    head = ["class", "images with it", "found", "missed", "wrongly found"]
    return Section("Found and missed by class", tables=[PageTable(head, rows, "at a score of 0.5", words=(0,))])


def _matrix(confusion: Tensor, names: Sequence[str]) -> Plot:
    shares = recalls(confusion)
    # Equal names, and names that are numbers, would share a place or lie on an axis of numbers.
    labels = [plain(name) for name in names]
    places = list(range(len(names)))
    short = [plain(name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…") for name in names]
    ticks = {"tickmode": "array", "tickvals": places, "ticktext": short}
    counts = confusion.tolist()
    text = [
        [f"true {labels[row]}, predicted {labels[column]}: {counts[row][column]:,}" for column in places]
        for row in places
    ]
    values = [[None if value != value else round(float(value), 4) for value in row] for row in shares]
    heat = {
        "type": "heatmap",
        "z": values,
        "x": places,
        "y": places,
        "text": text,
        "hovertemplate": "%{text} (%{z:.1%} of the class)<extra></extra>",
        "colorscale": "Blues",
        "zmin": 0,
        "zmax": 1,
    }
    axis = {"title": {"text": "predicted"}, **ticks}
    return Plot(
        "confusion matrix",
        [heat],
        {"xaxis": axis, "yaxis": {"title": {"text": "true"}, "autorange": "reversed", **ticks}},
        large=True,
    )


def _cost(file: Path) -> Section:
    if not file.is_file():
        return Section("Cost")
    tables = [PageTable(cells[0], cells[1:], title, words=(0, 1)) for title, cells in cost_tables(_json(file)).items()]
    return Section("Cost", tables=tables)


def _samples(folder: Path, most: int = 6) -> Section:
    """Return the sample predictions in the course of the training, at most so many epochs, the last included."""
    found = sorted(folder.glob("epoch-*.png")) if folder.is_dir() else []
    step = max(1, -(-len(found) // most))
    pictures = [Picture(path.read_bytes(), path.stem.replace("-", " ")) for path in found[::-1][::step][::-1]]
    return Section("Sample predictions", pictures=[Pictures(pictures, wide=True)] if pictures else [])


def _recipe(config: Path, result: Mapping[str, Any]) -> Section:
    return Section("Recipe", tables=[_about(result)] if result else [], texts=_texts(config, result))


def _about(result: Mapping[str, Any]) -> PageTable:
    rows = [["device", str(result.get("device"))], ["finished", str(result.get("finished"))]]
    rows += [[name, str(number)] for name, number in (result.get("versions") or {}).items()]
    return PageTable(["", ""], rows, "Made with", words=(0, 1))


def _texts(config: Path, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    command = [("command", str(result["command"]))] if result.get("command") else []
    return [*command, ("config.yaml", config.read_text(encoding="utf-8"))]


def _comparison(rows: Sequence[Mapping[str, Any]], score: str, costs: Mapping[str, Any] | None) -> PageTable:
    others = list(dict.fromkeys(other for row in rows for other in row["against"]))
    head = ["method", "n", f"{score}, last epoch", "std", "best epoch", "std"]
    head += [title for other in others for title in (f"vs {other}", "p")]
    head += ["parameters", "+ training", "s", "MiB"]
    if costs is not None:
        head.append(f"step / {costs['reference']}")
    body = []
    for row in rows:
        cells = [row["method"], str(len(row["seeds"]))]
        cells += [_number(row[key]) for key in ("last", "last_std", "best", "best_std")]
        for other in others:
            found = row["against"].get(other)
            cells += (
                ["", ""]
                if found is None
                else [f"{found['mean']:+.2f}", "" if found["p"] is None else f"{found['p']:.2g}"]
            )
        cells += [f"{row['parameters']:,}", f"{row['method_parameters']:,}", f"{row['seconds']:.0f}"]
        cells.append(_number(row["peak_memory"], 0))
        if costs is not None:
            cells.append(_number(row["step_cost"]))
        body.append(cells)
    return PageTable(
        head, body, "Percent; mean and standard deviation over n seeds; differences in points, p of a paired t-test"
    )


def _all_measurements(summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> PageTable:
    names = list(dict.fromkeys(name for found in summary.values() for name in found if not name.startswith(PREFIX)))
    rows = [
        [method, *(_percent(name, found[name]["mean"]) if name in found else "" for name in names)]
        for method, found in summary.items()
    ]
    return PageTable(["method", *names], rows, "All measurements, mean over the seeds")


def _spread_plot(courses: Mapping[str, Sequence[Sequence[Row]]], score: str) -> Plot:
    data: list[dict[str, Any]] = []
    colors = (
        "#1f77b4",
        "#ff7f0e",
        "#2ca02c",
        "#d62728",
        "#9467bd",
        "#8c564b",
        "#e377c2",
        "#7f7f7f",
        "#bcbd22",
        "#17becf",
    )
    for number, (method, runs) in enumerate(courses.items()):
        color = colors[number % len(colors)]
        by_epoch: dict[float, list[float]] = {}
        for run in runs:
            for row in run:
                if score in row:
                    by_epoch.setdefault(row["epoch"], []).append(100 * row[score])
        epochs = sorted(by_epoch)
        mean = [statistics.mean(by_epoch[epoch]) for epoch in epochs]
        std = [statistics.stdev(by_epoch[epoch]) if len(by_epoch[epoch]) > 1 else 0.0 for epoch in epochs]
        name = plain(method)
        line = {"type": "scatter", "mode": "lines+markers" if len(epochs) < 40 else "lines", "line": {"color": color}}
        data.append({**line, "name": name, "legendgroup": name, "x": epochs, "y": mean})
        if any(std):
            band = {
                "x": [*epochs, *epochs[::-1]],
                "y": [
                    *(one + spread for one, spread in zip(mean, std, strict=True)),
                    *(one - spread for one, spread in zip(mean[::-1], std[::-1], strict=True)),
                ],
            }
            data.append(
                {"type": "scatter", "mode": "lines", "fill": "toself", "line": {"width": 0}, "fillcolor": color + "26"}
                | {"hoverinfo": "skip", "showlegend": False, "legendgroup": name, **band}
            )
    layout = {
        "xaxis": {"title": {"text": "epoch"}},
        "yaxis": {"title": {"text": f"{plain(score)} (%)"}},
        "hovermode": "x unified",
    }
    return Plot(f"{score}, mean ± standard deviation over the seeds", data, layout)


def _classes_of(courses: Mapping[str, Sequence[Sequence[Row]]]) -> Section:
    lasts = {method: [run[-1] for run in runs if run] for method, runs in courses.items()}
    names = list(
        dict.fromkeys(name for runs in lasts.values() for run in runs for name in run if name.startswith(PREFIX))
    )
    rows = []
    for name in names:
        values = [[100 * run[name] for run in runs if name in run] for runs in lasts.values()]
        rows.append([name.removeprefix(PREFIX), *(f"{statistics.mean(one):.1f}" if one else "" for one in values)])
    return Section(
        "IoU by class", tables=[PageTable(["class", *lasts], rows, "%, mean over the seeds")] if rows else []
    )


def _pictures_of(folder: Path) -> Section:
    """Return the pictures that a demonstration has drawn beside its tables."""
    found = [path for name in ("boxes.png", "demo.png") if (path := folder / name).is_file()]
    pictures = [Picture(path.read_bytes(), path.name) for path in found]
    return Section("Pictures", pictures=[Pictures(pictures, wide=True)] if pictures else [])


def _curves(rows: Sequence[Row], prefix: str) -> dict[str, list[tuple[float, float]]]:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix))
    return {name.removeprefix(prefix): _points(rows, name) for name in names}


def _points(rows: Sequence[Row], name: str, factor: float = 1.0) -> list[tuple[float, float]]:
    return [(row["epoch"], factor * row[name]) for row in rows if name in row]


def _percent(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.2f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"])
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return str(value)


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): it is damaged, remove it and run the command again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no values by name: it is damaged, remove it and run the command again")
    return content


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: correct it") from error
    return content if isinstance(content, dict) else {}
