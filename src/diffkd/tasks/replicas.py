"""The processes of one training: which is the first, and how their copies of a model are kept alike."""

import inspect
import os
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


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


def strategy_for(strategy: str, devices: list[int] | int | str, num_nodes: int) -> str | Strategy:
    """Return the trainer's strategy; "auto" is DDP on several devices, "fsdp" PyTorch's own FSDP2."""
    if strategy == "fsdp":
        return ModelParallelStrategy(save_distributed_checkpoint=False)
    several = num_nodes > 1 or not (devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1))
    if strategy == "ddp" or (strategy == "auto" and several):
        # Buffers are brought into line before each validation, whose batches may differ in number between processes.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
        return DDPStrategy(**options)
    return strategy


def device_name(trainer: Trainer) -> str:
    """Return how many devices of what kind a trainer uses, such as "2 x cpu"."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} x {name}"
