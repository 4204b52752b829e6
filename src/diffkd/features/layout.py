"""Layouts of features: the order of channels and positions, and conversion to (B, C, H, W) or (B, C)."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

MAX_PREFIX_TOKENS = 8
_TOKENS = ("tokens", "sequence")


@dataclass(frozen=True)
class Layout:
    """The layout of a layer's output.

    Args:
        kind: "nchw" (B, C, H, W); "nhwc" (B, H, W, C); "tokens" (B, prefix + H * W, C); "sequence", tokens before
            the batch (prefix + H * W, B, C), the default of PyTorch's transformers; "vector" (B, C); "rows" (..., C),
            any number of vectors, such as a detector's boxes (B, N, 4), which are read as (B * N, 4).
        prefix: number of class, distillation and register tokens before the grid; they are dropped.
        grid: (H, W) of the tokens at the probed input size.
    """

    kind: Literal["nchw", "nhwc", "tokens", "sequence", "vector", "rows"]
    prefix: int = 0
    grid: tuple[int, int] = (1, 1)

    def channels(self, shape: Sequence[int]) -> int:
        """Return the channels of a tensor of this layout and `shape`."""
        return shape[1] if self.kind in ("nchw", "vector") else shape[-1]

    def batch(self, shape: Sequence[int]) -> int:
        """Return the batch size of a tensor of this layout and `shape`."""
        return shape[1] if self.kind == "sequence" else shape[0]

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return (H, W) of a tensor of this layout and `shape`, () for a vector."""
        sizes: dict[str, tuple[int, ...]] = {
            "nchw": tuple(shape[2:4]),
            "nhwc": tuple(shape[1:3]),
            "tokens": self.grid,
            "sequence": self.grid,
            "vector": (),
            "rows": (),
        }
        return sizes[self.kind]

    def read(self, tensor: Tensor) -> Tensor:
        """Return `tensor` as (B, C, H, W), or as (B, C) if it holds vectors.

        Raises:
            ValueError: if the tokens do not fill a grid.
        """
        if self.kind == "nhwc":
            return tensor.permute(0, 3, 1, 2)
        if self.kind in _TOKENS:
            tokens = tensor if self.kind == "tokens" else tensor.transpose(0, 1)
            tokens = tokens[:, self.prefix :].transpose(1, 2)  # (B, C, H * W)
            return tokens.reshape(*tokens.shape[:2], *self._grid_of(tokens.shape[2]))
        if self.kind == "rows":
            return tensor.flatten(0, -2)
        return tensor

    def _grid_of(self, count: int) -> tuple[int, int]:
        height, width = self.grid
        if height * width == count:
            return self.grid
        height = max(1, round(math.sqrt(count * height / width)))
        if count % height:
            raise ValueError(
                f"{count} tokens do not fill a grid of the proportions {self.grid[0]}x{self.grid[1]}; probe the models "
                "with an example of the size that they are trained on, or give the pair a Layout"
            )
        return height, count // height

    def __str__(self) -> str:
        return f"{self.kind}+{self.prefix}" if self.prefix else self.kind


def infer_layout(
    shape: Sequence[int],
    input_size: tuple[int, int] | None,
    prefixes: Collection[int] = (),
    grids: Collection[tuple[int, int]] = (),
    batch: int | None = None,
) -> Layout | None:
    """Infer the layout of a layer's output from its shape.

    Args:
        shape, input_size, prefixes, grids, batch: as for :func:`fitting_layouts`.

    Returns:
        The only layout that fits, or the first of several. None if the shape is not understood, or if several token
        grids fit, of which none has exactly the proportions of the input or the declared number of prefix tokens (0 if
        the model declares none).
    """
    fits = fitting_layouts(shape, input_size, prefixes, grids, batch)
    if len(fits) > 1 and input_size is not None and fits[0].kind in _TOKENS:
        likely = fits[0].prefix in (prefixes or (0,)) or _error(fits[0].grid, input_size) == 0
        return fits[0] if likely else None
    return fits[0] if fits else None


def fitting_layouts(
    shape: Sequence[int],
    input_size: tuple[int, int] | None,
    prefixes: Collection[int] = (),
    grids: Collection[tuple[int, int]] = (),
    batch: int | None = None,
) -> list[Layout]:
    """Return the layouts that the shape of a layer's output allows, the most likely first.

    A grid of positions has the proportions of the input, up to rounding; channels do not. Maps of exactly these
    proportions come first, then those of a size in `grids`, since the model may resize its images or drop borders, then
    (B, C, H, W) before (B, H, W, C). If tokens fill a grid of exactly these proportions, or else one of these sizes,
    other grids are excluded; the fewest prefix tokens come first.

    Args:
        shape: of the output.
        input_size: (H, W) of the model's input, None if it has none.
        prefixes: the numbers of prefix tokens that the model declares; a layer has one of these, or none. Empty: up to
            8 are tried.
        grids: (H, W) of the outputs of the model's convolutions and other layers for maps.
        batch: batch size of the input, to detect layouts with tokens before the batch; None if unknown.
    """
    if len(shape) == 2:
        return [Layout("vector")]
    if len(shape) == 4 and input_size is None:
        return [Layout("nchw")]
    if len(shape) == 4 and input_size is not None:
        maps = (Layout("nchw"), (shape[2], shape[3])), (Layout("nhwc"), (shape[1], shape[2]))
        errors = {layout: _error(size, input_size) for layout, size in maps}
        ranks = {layout: 0 if errors[layout] == 0 else 1 if size in grids else 2 for layout, size in maps}
        return sorted((one for one in ranks if ranks[one] == 1 or errors[one] is not None), key=lambda one: ranks[one])
    if len(shape) == 3 and shape[2] > 1 and input_size is not None:
        tried = [*sorted(prefixes), 0] if prefixes else range(MAX_PREFIX_TOKENS + 1)
        kind: Literal["tokens", "sequence"] = "sequence" if shape[0] != batch == shape[1] else "tokens"
        count = shape[0] if kind == "sequence" else shape[1]
        tokens = [
            Layout(kind, prefix, grid)
            for prefix in dict.fromkeys(tried)
            if (grid := _grid(count - prefix, input_size)) is not None
        ]
        exact = [layout for layout in tokens if _error(layout.grid, input_size) == 0]
        known = [Layout(kind, n, grid) for n in tried for grid in grids if n + math.prod(grid) == count]
        return exact or known or tokens
    return []


def _error(size: tuple[int, int], input_size: tuple[int, int]) -> int | None:
    """The difference of a grid's proportions from the input's, 0 if equal; None if it is no grid of the input."""
    (height, width), (full_height, full_width) = size, input_size
    error = abs(height * full_width - width * full_height)
    # Each side is rounded to whole cells separately, so the proportions may be off by one cell of either; the equal
    # sides of a square are rounded alike, which distinguishes 7x7x8 from 7x8 positions, and 16 + 4 tokens from 4x5.
    tolerance = 0 if full_height == full_width else max(input_size)
    return error if height <= full_height and width <= full_width and error <= tolerance else None


def _grid(count: int, input_size: tuple[int, int]) -> tuple[int, int] | None:
    if count < 1:
        return None
    full_height, full_width = input_size
    middle = math.sqrt(count * full_height / full_width)
    sizes = [(height, count // height) for height in (math.floor(middle), math.ceil(middle)) if height]
    errors = {size: _error(size, input_size) for size in sizes if math.prod(size) == count}
    return min((size for size in errors if errors[size] is not None), key=lambda size: errors[size] or 0, default=None)


def select_tensor(output: Any, key: str | None = None) -> Tensor | None:
    """Return the tensor to use of a module's output.

    Args:
        output: a tensor, or any nesting of tuples, lists, mappings and objects with `logits` around tensors.
        key: key of a mapping or index of a sequence; None: `logits` if there is one, else "out", else the first tensor
            of more than one dimension, preferring direct elements over nested ones (a list of features before the
            logits is skipped), or else any tensor (a loss is skipped likewise).

    Returns:
        The tensor, or None if there is none.
    """
    if key is not None:
        return select_tensor(_element(output, key))
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Mapping):
        for name in ("logits", "out"):
            if name in output and (tensor := select_tensor(output[name])) is not None:
                return tensor
        elements = list(output.values())
    elif isinstance(output, Sequence) and not isinstance(output, str):
        elements = list(output)
    else:
        return None
    elements.sort(key=lambda element: not isinstance(element, Tensor))
    tensors = [tensor for element in elements if (tensor := select_tensor(element)) is not None]
    return next((tensor for tensor in tensors if tensor.ndim > 1), tensors[0] if tensors else None)


def _element(output: Any, key: str) -> Any:
    if isinstance(output, Mapping):
        for name, value in output.items():
            if str(name) == key:
                return value
    elif isinstance(output, Sequence) and key.lstrip("-").isdigit() and -len(output) <= int(key) < len(output):
        return output[int(key)]
    return None


def resize(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map (B, C, H, W) to `size`: by averaging to a smaller, bilinearly to a larger size."""
    height, width = feature.shape[2:]
    if (height, width) == tuple(size):
        return feature
    if size[0] <= height and size[1] <= width:
        return F.adaptive_avg_pool2d(feature, size)
    return F.interpolate(feature, size, mode="bilinear", align_corners=False)
