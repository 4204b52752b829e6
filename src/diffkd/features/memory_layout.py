"""Memory layout of maps (channels last). It changes the time, and numbers by rounding alone."""

from typing import Any

import torch
from torch import Tensor, nn

from diffkd.features.calling import evaluation_mode, on_device_of, run

# On a CPU, maps of at most this many positions are computed as rows of channels: 1x1 convolutions are matrix products
# then, and small batch normalisations faster. On larger ones PyTorch's plain layout is as fast or faster.
ROWS_UP_TO = 256


def fast_layout(feature: Tensor) -> torch.memory_format:
    """Return the layout to compute (B, C, H, W) in: channels-last for small maps on a CPU, else the feature's own.

    Vectors, and maps that are laid out in some third way, are computed in the plain layout.
    """
    small = feature.is_cpu and feature.shape[2:].numel() <= ROWS_UP_TO
    if feature.ndim == 4 and (small or feature.is_contiguous(memory_format=torch.channels_last)):
        return torch.channels_last
    return torch.contiguous_format


def drawn(like: Tensor) -> Tensor:
    """Return standard normal noise, drawn in the order of the indices: a seed gives the same noise in any layout."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device)


def try_channels_last(model: nn.Module, example: Any) -> bool:
    """Lay a model's weights out with the channels last, which its activations follow, if it runs like that.

    Convolutions are faster so on most CPUs, and on GPUs in 16 bits. A model that views activations as one row per image
    (`x.view(len(x), -1)`) does not run, and neither do three-dimensional convolutions.

    Args:
        model: changed in place, or left in the plain layout.
        example: its input: a tensor, a tuple of arguments, or a mapping of keyword arguments; moved to its device.

    Returns:
        Whether it was.
    """
    try:
        model.to(memory_format=torch.channels_last)
        with evaluation_mode(model), torch.no_grad():
            run(model, on_device_of(model, example))
    except RuntimeError:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.contiguous()
        return False
    return True
