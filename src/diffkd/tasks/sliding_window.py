"""Segmentation of large images by a window that slides over them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkd.models.any_size import class_map, upsample


@torch.no_grad()
def sliding_window(
    model: Callable[[Tensor], Any],
    images: Tensor,
    *,
    window: tuple[int, int],
    stride: tuple[int, int],
    num_classes: int,
) -> Tensor:
    """Segment images window by window and average the logits where windows overlap.

    Windows begin every `stride` pixels; the last of a row or column is shifted back so that it ends with the image. A
    side of an image that is shorter than the window is taken whole. Logits are averaged, not probabilities, so that the
    result can be used as the model's own. No gradients are recorded.

    Args:
        model: maps images (B, C, h, w) to logits (B, K, h', w') or what holds them as "out" or `logits`; they are
            up-sampled to the window. It must take windows of the given size, and smaller ones if images are smaller:
            :class:`diffkd.models.AnySize` does.
        images: (B, C, H, W).
        window: height and width in pixels.
        stride: steps down and to the right in pixels, at most the window's.
        num_classes: K.

    Returns:
        Logits (B, K, H, W), at least in float32. Where all windows agree on a pixel, it is exactly what they say.

    Raises:
        ValueError: if `window` or `stride` would leave pixels out, the images are not (B, C, H, W) with at least one
            pixel, or the model returns another number of classes.
    """
    for name, sides in (("window", window), ("stride", stride)):
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"{name} {tuple(sides)} covers nothing: give height and width of at least 1 pixel")
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(
            f"stride {tuple(stride)} steps over pixels between windows of {tuple(window)}: "
            "make it no larger than the window on either side"
        )
    if images.ndim != 4 or 0 in images.shape[-2:]:
        raise ValueError(f"images of shape {tuple(images.shape)} cannot be segmented: give (B, C, H, W)")
    batch, _, height, width = images.shape
    high, wide = min(window[0], height), min(window[1], width)
    mean: Tensor | None = None
    count = torch.zeros((height, width), device=images.device)
    for top in _starts(height, high, stride[0]):
        for left in _starts(width, wide, stride[1]):
            rows, columns = slice(top, top + high), slice(left, left + wide)
            logits = upsample(class_map(model(images[..., rows, columns])), (high, wide))
            if logits.shape[1] != num_classes:
                raise ValueError(
                    f"the model returned {logits.shape[1]} classes, and num_classes is {num_classes}: make them equal"
                )
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if mean is None:
                mean = logits.new_zeros((batch, num_classes, height, width))
            count[rows, columns] += 1
            before = mean[..., rows, columns]
            # The running mean leaves equal logits exactly as they are, infinite ones too, which a sum would not.
            moved = torch.where(count[rows, columns] == 1, logits, before + (logits - before) / count[rows, columns])
            mean[..., rows, columns] = torch.where(logits == before, before, moved)
    assert mean is not None  # there is at least one window
    return mean


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along a side of `size` pixels, the last such that it ends with the side."""
    last = size - window
    return [*range(0, last, stride), last]
