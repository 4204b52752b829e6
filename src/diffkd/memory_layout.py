"""In which order the numbers of a feature lie in memory, which decides how fast they are computed."""

import torch
from torch import Tensor

# On a CPU, maps of at most this many positions are computed as rows of channels: 1x1 convolutions are matrix products
# then, and small batch normalisations faster. On larger ones PyTorch's plain layout is.
_ROWS_UP_TO = 256


def layout_for(feature: Tensor) -> torch.memory_format:
    """The memory layout in which to compute: the feature's own, if that is not slow. No number depends on it."""
    small = feature.is_cpu and feature.shape[2:].numel() <= _ROWS_UP_TO
    if feature.ndim == 4 and (small or feature.is_contiguous(memory_format=torch.channels_last)):
        return torch.channels_last
    return torch.contiguous_format


def drawn(like: Tensor) -> Tensor:
    """Standard normal noise, drawn in the order of the indices whatever the layout: a seed gives the same noise."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device)
