"""Pictures of segmentation: class maps laid over the images they belong to."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from diffkd.data.palette import palette
from diffkd.figure_file import write_figure
from diffkd.legend import MOST_NAMES, as_written


def draw_overlays(
    path: str | Path,
    images: Tensor,
    maps: Mapping[str, Tensor],
    classes: Sequence[str],
    *,
    ignore_index: int = 255,
    opacity: float = 0.6,
) -> Path:
    """Draw images in rows, and beside each the class maps of several models laid over it.

    Args:
        path: PNG or SVG file to write.
        images: (B, C, H, W) in any range, of one or three channels.
        maps: for each title ("student", "teacher", "truth"), class ids (B, H', W') of any resolution.
        classes: names of the K classes, for the legend.
        ignore_index: id that is shown as the image alone; ids of no class are shown likewise.
        opacity: of the colours, in [0, 1].

    Returns:
        The path.

    Raises:
        ValueError: if there is nothing to draw, a shape is another one, or `opacity` is out of range.
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
    as_written(legend)
    return write_figure(path, figure)


def _in_range(image: Tensor) -> npt.NDArray[np.float64]:
    """Return an image (C, H, W) as (H, W, 3) in [0, 1]."""
    low, high = image.amin(), image.amax()
    scaled = ((image - low) / (high - low).clamp(min=1e-8)).movedim(0, -1)
    return np.asarray(scaled.expand(*scaled.shape[:2], 3).double().cpu().numpy())


def _overlaid(
    pixels: npt.NDArray[np.float64], ids: Tensor, colours: npt.NDArray[np.uint8], ignore_index: int, opacity: float
) -> npt.NDArray[np.float64]:
    """Return grey pixels with the colours of class ids, (H', W', 3): at the resolution of the ids."""
    known = np.asarray(ids.cpu().numpy())
    rows, columns = (np.arange(new) * old // new for new, old in zip(known.shape, pixels.shape, strict=False))
    grey = pixels[rows][:, columns].mean(axis=2, keepdims=True)
    counts = (known >= 0) & (known < len(colours)) & (known != ignore_index)
    painted = colours[np.where(counts, known, 0)] / 255
    mixed = (1 - opacity) * grey + opacity * painted
    return np.asarray(np.where(counts[..., None], mixed, np.broadcast_to(grey, mixed.shape)))
