"""In which order of memory maps are computed. No number depends on it, only the time."""

import torch
from torch import Tensor

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
