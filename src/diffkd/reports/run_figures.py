"""Figures of one run: curves, gamma, saliency of features, distributions of logits."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from diffkd.files.history import Row
from diffkd.reports.plots import draw_image, draw_maps, write_figure


def draw_curves(path: Path, rows: Sequence[Row], score: str) -> Path:
    """Draw per epoch the score, the training losses by term and, if present, the mean gammas (Fig. 5).

    Args:
        path: PNG or SVG file to write.
        rows: rows of the run's `metrics.csv`, one per epoch.
        score: the measurement to show, in [0, 1].

    Returns:
        The path.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    panels = {
        f"{score} (%)": [name for name in (score, f"{score}_unaveraged") if name in names],
        "training loss": [name for name in names if name.startswith("train/")],
        "gamma (mean)": [name for name in names if name.startswith("gamma/")],
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        factor = 100 if title.endswith("(%)") else 1
        for name in lines:
            values = [(row["epoch"], factor * row[name]) for row in rows if name in row]
            label = name.removeprefix("train/").removeprefix("gamma/")
            axes.plot(*zip(*values, strict=True), label=label, marker="." if len(values) < 30 else None)
        if title == "training loss" and all(row.get(name, 1) > 0 for row in rows for name in lines):
            axes.set_yscale("log")
        axes.set(xlabel="epoch", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return write_figure(path, figure)


def draw_gammas(path: Path, gammas: Mapping[str, Tensor]) -> Path:
    """Draw a histogram of gamma for each pair (Fig. 5): the share of the student's feature that is kept, 1: all of it.

    Args:
        path: PNG or SVG file to write.
        gammas: for each pair, (N,) in [0, 1].

    Returns:
        The path.
    """
    figure = Figure(figsize=(4 * len(gammas), 3.2), layout="constrained")
    for axes, (pair, values) in zip(figure.subplots(1, len(gammas), squeeze=False)[0], gammas.items(), strict=True):
        axes.hist(values.numpy(), bins=np.linspace(0, 1, 51))
        axes.set(title=f"{pair}: mean {values.mean():.3f}, n = {len(values)}", xlabel="gamma", ylabel="images")
        axes.title.set_fontsize(9)
    return write_figure(path, figure)


def draw_saliency(path: Path, images: Sequence[Tensor], maps: Mapping[str, Sequence[Tensor]]) -> Path:
    """Draw a row for each image, with the saliency maps of features beside it (Fig. 2 and 7).

    Args:
        path: PNG or SVG file to write.
        images: each (C, H, W), in any range.
        maps: for each title a map (h, w) per image, from :func:`~diffkd.reports.plots.saliency`.

    Returns:
        The path.
    """
    figure = Figure(figsize=(1.7 * (1 + len(maps)), 1.7 * len(images)), layout="constrained")
    draw_maps(figure, images, maps)
    return write_figure(path, figure)


def draw_scores(path: Path, images: Sequence[Tensor], scores: Mapping[str, Tensor], classes: Sequence[str]) -> Path:
    """Draw a row for each image, with the probabilities of the teacher's top five classes beside it (Fig. 6).

    Args:
        path: PNG or SVG file to write.
        images: each (C, H, W), in any range.
        scores: for each title, class probabilities (B, K); the teacher's come last.
        classes: names of the K classes.

    Returns:
        The path.
    """
    figure = Figure(figsize=(1.7 + 2.4 * len(scores), 1.7 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 1 + len(scores), squeeze=False, width_ratios=[1.7, *[2.4] * len(scores)])
    likeliest = list(scores.values())[-1].topk(min(5, len(classes)), dim=1).indices
    for row, (image, chosen) in enumerate(zip(images, likeliest, strict=True)):
        draw_image(grid[row][0], image)
        for column, (title, values) in enumerate(scores.items(), start=1):
            axes: Axes = grid[row][column]
            axes.barh(range(len(chosen)), values[row][chosen].numpy())
            axes.set(xlim=(0, 1), ylim=(len(chosen) - 0.5, -0.5))
            names = [classes[index] for index in chosen.tolist()]
            axes.set_yticks(range(len(chosen)), names, fontsize=7, parse_math=False)
            axes.tick_params(axis="x", labelsize=7)
            if row == 0:
                axes.set_title(title, fontsize=10)
            if column > 1:
                axes.set_yticklabels([])
    return write_figure(path, figure)
