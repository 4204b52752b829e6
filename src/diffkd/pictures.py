"""Pictures of detections: the same images side by side, with the boxes of several detectors and the truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from diffkd.figure_file import write_figure
from diffkd.legend import MOST_NAMES, as_written

Boxes = Mapping[str, Tensor]


def draw_boxes(
    path: str | Path,
    images: Sequence[Tensor],
    columns: Mapping[str, Sequence[Boxes]],
    classes: Sequence[str],
    *,
    threshold: float = 0.3,
) -> Path:
    """Draw a row for each image and a column for each detector, boxes in the colour of their class.

    Args:
        path: PNG or SVG file to write.
        images: each (3, H, W) in [0, 1].
        columns: for each title ("teacher", "truth"), what there is in each image: "boxes" (n, 4) left, top, right and
            bottom in pixels, "labels" (n,) from 1, and of a detector "scores" (n,).
        classes: names of the classes; label 1 is the first.
        threshold: boxes of lower scores are left out; those without scores are all drawn.

    Returns:
        The path.

    Raises:
        ValueError: if there is nothing to draw, or a column has not one entry per image.
    """
    if not images or not columns:
        raise ValueError(f"{len(images)} images and {len(columns)} columns make no picture: give at least one of each")
    for title, found in columns.items():
        if len(found) != len(images):
            raise ValueError(f"column {title!r} has {len(found)} entries for {len(images)} images: give one for each")
    colors = matplotlib.color_sequences["tab10"]
    # A figure of its own rather than pyplot: no global state, no window.
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
    as_written(figure.legend(handles, shown, loc="outside lower center", ncols=min(len(shown), 6), fontsize=9))
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
