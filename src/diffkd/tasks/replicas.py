"""The processes of one training: which is the first, and how their copies of a model are kept alike."""

import os

import torch
from torch import distributed, nn


def is_first_process() -> bool:
    """Return whether this process is, or will be, the one that writes files, as launchers tell by the environment."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def several_processes() -> bool:
    """Return whether a process group of more than one process has been set up."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, such as BatchNorm's running statistics; alone, do nothing."""
    if several_processes():
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
