"""Several processes: DDP, FSDP, the first process, buffers and parameters gathered."""

import copy
import inspect
import os
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffkd.files.weights import unwrap


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


def shards(trainer: Trainer) -> bool:
    """Whether a trainer spreads the parameters over its processes."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def shard(model: nn.Module, device: torch.device, processes: int) -> None:
    """Spread the parameters of a model over all processes; they are gathered for the length of each step.

    Raises:
        RuntimeError: if this PyTorch adds up the gradients of the processes on this device, as 2.8 does on CPUs.
    """
    mesh = init_device_mesh(device.type, (processes,))
    probe = nn.Linear(1, 1, bias=False).to(device)
    fully_shard(probe, mesh=mesh)
    probe(torch.ones(1, 1, device=device)).sum().backward()
    if probe.weight.grad is None or whole(probe.weight.grad).item() != 1:
        raise RuntimeError(
            f"PyTorch {torch.__version__} adds up the gradients of shards on a {device.type}, where their mean is "
            "wanted: take --strategy ddp, or a newer PyTorch"
        )
    model.to(memory_format=torch.contiguous_format)  # others cannot be cut into shards
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, which all must ask for it; as it is if it is not spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor; as it is if it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class WholeStudent:
    """A copy of a student with all of its weights in every process, which can be run and saved by each alone.

    Deliberately no `nn.Module`: as nobody's submodule it is neither spread nor optimised.

    Args:
        student: copied before its parameters are spread.
    """

    def __init__(self, student: nn.Module) -> None:
        self.model = copy.deepcopy(unwrap(student)).requires_grad_(False).eval()

    @torch.no_grad()
    def gather(self, student: nn.Module) -> None:
        """Take over the student's weights as they are now; call on all processes at once."""
        student = unwrap(student)
        for ours, theirs in (
            *zip(self.model.parameters(), student.parameters(), strict=True),
            *zip(self.model.buffers(), student.buffers(), strict=True),
        ):
            ours.copy_(whole(theirs))
