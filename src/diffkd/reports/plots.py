"""Learning curves, saliency maps, and saving of figures."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from diffkd.files.weights import write_whole


def write_figure(path: str | Path, figure: Figure) -> Path:
    """Save a figure atomically, in the format of the path's suffix, PNG without a suffix.

    Args:
        path: PNG, SVG or any other format of matplotlib.
        figure: the figure.

    Returns:
        The path.

    Raises:
        ValueError: if matplotlib does not know the suffix.
    """
    path = Path(path)
    write_whole(path, lambda file: figure.savefig(file, dpi=120, format=path.suffix.lstrip(".") or "png"))
    return path


def saliency(feature: Tensor, temperature: float = 0.5) -> Tensor:
    """Return the saliency map `H W softmax(mean over channels / tau)` over positions (Eq. 10 of the paper).

    Args:
        feature: (B, C, H, W).
        temperature: tau; the paper uses 0.5.

    Returns:
        (B, H, W), each map of mean 1.
    """
    strength = feature.float().mean(dim=1)  # (B, H, W)
    share = (strength.flatten(1) / temperature).softmax(dim=1)
    return (share * share.shape[1]).reshape(strength.shape)


def draw_results(
    path: str | Path,
    curves: Mapping[str, Sequence[Sequence[float]]],
    images: Tensor | None = None,
    maps: Mapping[str, Tensor] | None = None,
    *,
    ylabel: str = "test accuracy (%)",
) -> Path:
    """Draw learning curves and, beside them, saliency maps.

    Args:
        path: PNG or SVG file to write.
        curves: for each method, one sequence per seed with a value per epoch; if lengths differ, each epoch shows the
            seeds that have a value.
        images: (B, C, H, W) the images of the maps, in any range.
        maps: for each title ("student", "denoised", "teacher"), (B, H, W) from :func:`saliency`.
        ylabel: label of the curves' y axis.

    Returns:
        The path.
    """
    # A `Figure` instead of pyplot: no global state, no window.
    figure = Figure(figsize=(12 if maps else 6.5, 4.5), layout="constrained")
    panels: list[Any] = list(np.asarray(figure.subfigures(1, 2), dtype=object)) if maps else [figure]
    axes = panels[0].subplots()
    for color, (method, runs) in zip(matplotlib.color_sequences["tab10"] * 2, curves.items(), strict=False):
        by_epoch = [[value for value in values if value is not None] for values in zip_longest(*runs)]
        mean = np.array([np.mean(values) for values in by_epoch])
        epochs = range(1, len(mean) + 1)
        axes.plot(epochs, mean, color=color, label=method, marker="." if len(mean) < 30 else None)
        if len(runs) > 1:
            std = np.array([np.std(values, ddof=1) if len(values) > 1 else np.nan for values in by_epoch])
            axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(title="mean ± std" if any(len(runs) > 1 for runs in curves.values()) else None)
    if maps is not None and images is not None:
        draw_maps(panels[1], images, maps)
    return write_figure(path, figure)


def draw_maps(
    figure: Figure | SubFigure, images: Tensor | Sequence[Tensor], maps: Mapping[str, Tensor | Sequence[Tensor]]
) -> None:
    """Draw a row for each image (C, H, W) into a figure, with one map (h, w) per title beside it."""
    columns = ["image", *maps]
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for row, image in enumerate(images):
        for column, title in enumerate(columns):
            axes = grid[row][column]
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=10)
            if column:
                axes.imshow(maps[title][row].numpy(), cmap="viridis")
            else:
                draw_image(axes, image)


def draw_image(axes: Axes, image: Tensor) -> None:
    """Draw an image (C, H, W), in any range, with one or three channels; other channel counts are averaged."""
    low, high = image.amin(), image.amax()
    pixels = (image - low) / (high - low).clamp(min=1e-8)
    pixels = pixels if len(pixels) in (1, 3) else pixels.mean(dim=0, keepdim=True)
    axes.imshow(pixels.movedim(0, -1).numpy(), cmap="gray")
    axes.set_axis_off()
