"""Figures of predictions: boxes of several detectors, class maps of several segmenters, and the ground truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from diffkd.data.segmentation.palette import palette
from diffkd.reports.plots import write_figure

MOST_NAMES = 40
"""Largest number of classes in a legend; more would leave no room for the images."""


def _disable_mathtext(legend: Legend) -> None:
    """Show the names literally: a dollar sign does not start mathtext."""
    for text in legend.get_texts():
        text.set_parse_math(False)


Boxes = Mapping[str, Tensor]


def draw_boxes(
    path: str | Path,
    images: Sequence[Tensor],
    columns: Mapping[str, Sequence[Boxes]],
    classes: Sequence[str],
    *,
    threshold: float = 0.3,
) -> Path:
    """Draw a row for each image and a column for each detector, with boxes in the colour of their class.

    Args:
        path: PNG or SVG file to write.
        images: each (3, H, W) in [0, 1].
        columns: for each title ("teacher", "truth"), per image the "boxes" (n, 4) left, top, right and bottom in
            pixels, "labels" (n,) from 1, and for a detector "scores" (n,).
        classes: names of the classes; label 1 is the first.
        threshold: boxes with lower scores are left out; boxes without scores are all drawn.

    Returns:
        The path.

    Raises:
        ValueError: if there is nothing to draw, or a column does not have one entry per image.
    """
    if not images or not columns:
        raise ValueError(f"{len(images)} images and {len(columns)} columns make no picture: give at least one of each")
    for title, found in columns.items():
        if len(found) != len(images):
            raise ValueError(f"column {title!r} has {len(found)} entries for {len(images)} images: give one for each")
    colors = matplotlib.color_sequences["tab10"]
    # A `Figure` instead of pyplot: no global state, no window.
    figure = Figure(figsize=(2.4 * len(columns), 2.4 * len(images) + 0.6), layout="constrained")
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for row, image in enumerate(images):
        for column, (title, found) in enumerate(columns.items()):
            axes = grid[row][column]
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=10)
            axes.imshow(image.detach().cpu().clamp(0, 1).movedim(0, -1).numpy())
            _draw(axes, found[row], colors, threshold)
    shown = list(classes[:MOST_NAMES])
    handles = [Rectangle((0, 0), 1, 1, color=colors[index % len(colors)]) for index in range(len(shown))]
    _disable_mathtext(figure.legend(handles, shown, loc="outside lower center", ncols=min(len(shown), 6), fontsize=9))
    return write_figure(path, figure)


def _draw(axes: Axes, found: Boxes, colors: Sequence[object], threshold: float) -> None:
    scores = found["scores"].tolist() if "scores" in found else [None] * len(found["labels"])
    for (left, top, right, bottom), label, score in zip(
        found["boxes"].tolist(), found["labels"].tolist(), scores, strict=True
    ):
        if score is not None and score < threshold:
            continue
        color = colors[(label - 1) % len(colors)]
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=1.5))
        if score is not None:
            axes.text(left, top, f"{score:.2f}", fontsize=6, color="white", backgroundcolor=color, va="bottom")


def draw_overlays(
    path: str | Path,
    images: Tensor,
    maps: Mapping[str, Tensor],
    classes: Sequence[str],
    *,
    ignore_index: int = 255,
    opacity: float = 0.6,
) -> Path:
    """Draw images in rows, each with overlays of the class maps of several models beside it.

    Args:
        path: PNG or SVG file to write.
        images: (B, C, H, W) in any range, of one or three channels.
        maps: for each title ("student", "teacher", "truth"), class ids (B, H', W') of any resolution.
        classes: names of the K classes, for the legend.
        ignore_index: id drawn without colour, as are ids of no class.
        opacity: of the colours, in [0, 1].

    Returns:
        The path.

    Raises:
        ValueError: if there is nothing to draw, a shape does not match, or `opacity` is out of range.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images of shape {tuple(images.shape)}: give (B, 1 or 3, H, W), at least one of them")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity={opacity}: give 0 (invisible) to 1")
    for title, ids in maps.items():
        if ids.ndim != 3 or len(ids) != len(images):
            raise ValueError(f"map '{title}' of shape {tuple(ids.shape)}: give ({len(images)}, H, W), one per image")
    colours = palette(len(classes))
    height, width = images.shape[2:]
    columns = ["image", *maps]
    named = min(len(classes), MOST_NAMES)
    legend_rows = -(-named // max(1, 2 * len(columns)))
    size = 1.7 * len(columns), 1.7 * len(images) * height / width + 0.4 + 0.25 * legend_rows
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for row, image in enumerate(images):
        pixels = _in_range(image)
        for column, title in enumerate(columns):
            axes = grid[row][column]
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=9)
            shown = pixels if not column else _overlaid(pixels, maps[title][row], colours, ignore_index, opacity)
            axes.imshow(shown, interpolation="nearest")
    patches = [
        Patch(color=tuple(colour / 255), label=name)
        for colour, name in zip(colours[:named], classes[:named], strict=True)
    ]
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=max(1, 2 * len(columns)), fontsize=7)
    _disable_mathtext(legend)
    return write_figure(path, figure)


def _in_range(image: Tensor) -> npt.NDArray[np.float64]:
    """Return an image (C, H, W) as (H, W, 3) in [0, 1]."""
    low, high = image.amin(), image.amax()
    scaled = ((image - low) / (high - low).clamp(min=1e-8)).movedim(0, -1)
    return np.asarray(scaled.expand(*scaled.shape[:2], 3).double().cpu().numpy())


def _overlaid(
    pixels: npt.NDArray[np.float64], ids: Tensor, colours: npt.NDArray[np.uint8], ignore_index: int, opacity: float
) -> npt.NDArray[np.float64]:
    """Return grey pixels with the colours of class ids, (H', W', 3), at the resolution of the ids."""
    known = np.asarray(ids.cpu().numpy())
    rows, columns = (np.arange(new) * old // new for new, old in zip(known.shape, pixels.shape, strict=False))
    grey = pixels[rows][:, columns].mean(axis=2, keepdims=True)
    counts = (known >= 0) & (known < len(colours)) & (known != ignore_index)
    painted = colours[np.where(counts, known, 0)] / 255
    mixed = (1 - opacity) * grey + opacity * painted
    return np.asarray(np.where(counts[..., None], mixed, np.broadcast_to(grey, mixed.shape)))
