"""What objects of a scene stand before: a soft field of colours and shapes that belong to no class."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_CELLS = 6  # colours along each side of the soft field
_SHAPES = 10  # rectangles and ellipses, at most


def cluttered_background(size: tuple[int, int], random: np.random.Generator) -> NDArray[np.float32]:
    """Draw a background.

    Args:
        size: (H, W) in pixels.
        random: source of all draws.

    Returns:
        (H, W, 3) float32 in [0, 255].
    """
    height, width = size
    middle, spread = random.uniform(60, 190, 3), random.uniform(10, 50)
    cells = np.clip(middle + spread * random.standard_normal((_CELLS, _CELLS, 3)), 0, 255).astype(np.uint8)
    field = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    canvas = np.array(field, dtype=np.float32)  # (H, W, 3)
    for _ in range(random.integers(_SHAPES + 1)):
        _draw_shape(canvas, random)
    return canvas


def _draw_shape(canvas: NDArray[np.float32], random: np.random.Generator) -> None:
    """Blend one rectangle or ellipse of a single colour into the canvas."""
    height, width, _ = canvas.shape
    extent = np.exp(random.uniform(np.log(0.03), np.log(0.5), 2)) * (height, width)
    centre = random.random(2) * (height, width)
    top, left = np.maximum(centre - extent / 2, 0).astype(int)
    bottom, right = np.minimum(centre + extent / 2 + 1, (height, width)).astype(int)
    color, opacity, rounded = random.uniform(0, 255, 3), random.uniform(0.3, 1.0), random.random() < 0.5
    region = canvas[top:bottom, left:right]
    if rounded:
        rows = (np.arange(top, bottom) - centre[0]) / (extent[0] / 2 + 0.5)
        columns = (np.arange(left, right) - centre[1]) / (extent[1] / 2 + 0.5)
        inside = rows[:, None] ** 2 + columns[None, :] ** 2 <= 1
        opacity = opacity * inside[:, :, None]
    region += (opacity * (color - region)).astype(np.float32)
