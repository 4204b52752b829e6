"""Memory format of maps (channels_last). It affects speed, and results only by rounding."""

from typing import Any

import torch
from torch import Tensor, nn

from diffkd.features.forward import evaluation_mode, on_device_of, run

# On a CPU, maps of at most this many positions are computed in channels_last: 1x1 convolutions are then matrix
# products, and small batch normalisations faster. For larger maps the contiguous format is as fast or faster.
ROWS_UP_TO = 256


def fast_layout(feature: Tensor) -> torch.memory_format:
    """Return the memory format to compute (B, C, H, W) in: channels_last for small maps on a CPU, else the feature's.

    Vectors, and maps with other strides, are computed in the contiguous format.
    """
    small = feature.is_cpu and feature.shape[2:].numel() <= ROWS_UP_TO
    if feature.ndim == 4 and (small or feature.is_contiguous(memory_format=torch.channels_last)):
        return torch.channels_last
    return torch.contiguous_format


def drawn(like: Tensor) -> Tensor:
    """Return standard normal noise that, for a given seed, does not depend on the memory format."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device)


def try_channels_last(model: nn.Module, example: Any) -> bool:
    """Convert a model's weights to channels_last, which its activations follow, if the model runs in that format.

    Convolutions are then faster on most CPUs, and on GPUs in 16 bits. Models with `x.view(len(x), -1)` on activations
    or with 3D convolutions fail in this format.

    Args:
        model: converted in place, or left in the contiguous format.
        example: its input: a tensor, a tuple of arguments, or a mapping of keyword arguments; moved to its device.

    Returns:
        Whether the model was converted.
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
