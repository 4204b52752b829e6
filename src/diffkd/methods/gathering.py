"""Tensors of all ranks, for memories that must be the same in every process. No gradient flows through."""

import torch
from torch import Tensor, distributed


def rank() -> int:
    """Return the rank of this process; 0 outside of distributed training."""
    return distributed.get_rank() if _is_distributed() else 0


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, of equal shape, one after the other along dimension 0."""
    if not _is_distributed() or distributed.get_world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def averaged(tensor: Tensor) -> Tensor:
    """Return the mean over all ranks."""
    return gathered(tensor[None]).mean(dim=0)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
