"""Training with parameters, gradients and optimiser state spread over the processes (FSDP of PyTorch)."""

import copy

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from diffkd.weights import unwrap


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
