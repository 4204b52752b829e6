"""Distributed training: launchers, DDP, FSDP, rank 0, gathered buffers and parameters."""

import copy
import inspect
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffkd.files.weights import unwrap

_OF_LAUNCHERS = re.compile(
    r"(TORCHELASTIC|SLURM|OMPI_COMM_WORLD|MV2_COMM_WORLD|PMI)_"
    r"|((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK|MASTER_ADDR|MASTER_PORT)$"
)


@dataclass(frozen=True)
class Launcher:
    """The launcher that started this process.

    Args:
        name: "torchrun", "srun" or "mpirun".
        rank: global rank of this process.
        processes: world size.
    """

    name: str
    rank: int
    processes: int


def launcher() -> Launcher | None:
    """Detect from the environment the launcher that started several processes; None if there is none.

    A single variable is no evidence: a shell on a cluster and subprocesses of a training have some of them too. An
    `sbatch` script without `srun` runs one process, whatever number of tasks was reserved.
    """
    environ = os.environ
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environ.keys() and "TORCHELASTIC_RUN_ID" in environ:
        return Launcher("torchrun", int(environ["RANK"]), int(environ["WORLD_SIZE"]))
    if "SLURM_STEP_NUM_TASKS" in environ and environ.get("SLURM_PROCID", "").isdigit():
        tasks = environ["SLURM_STEP_NUM_TASKS"]
        if tasks.isdigit() and int(tasks) > 1 and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
            return Launcher("srun", int(environ["SLURM_PROCID"]), int(tasks))
    for rank, size in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ):
        if environ.get(rank, "").isdigit() and environ.get(size, "").isdigit() and int(environ[size]) > 1:
            return Launcher("mpirun", int(environ[rank]), int(environ[size]))
    return None


def without_launcher() -> dict[str, str]:
    """Return the environment without the variables of launchers, for a training that starts its own processes."""
    return {name: value for name, value in os.environ.items() if not _OF_LAUNCHERS.match(name)}


def single_process(devices: list[int] | int | str, num_nodes: int) -> bool:
    """Return whether a training uses one process only."""
    if num_nodes > 1:
        return False
    if devices in ("auto", -1, "-1"):
        return not torch.accelerator.is_available() or torch.accelerator.device_count() <= 1
    if isinstance(devices, str) and "," in devices:
        devices = [int(one) for one in devices.split(",") if one.strip()]
    return devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)


def is_first_process(devices: list[int] | int | str = "auto", num_nodes: int = 1) -> bool:
    """Return whether this process is, or will be, rank 0 of its training, which writes files.

    Args:
        devices: how many, or which, of each node.
        num_nodes: machines.

    Raises:
        ValueError: if a launcher has started several processes for a training that uses one, which would all write
            the same files; or if the trainer does not support the launcher.
    """
    found = launcher()
    if single_process(devices, num_nodes):
        if found is not None and found.name == "torchrun" and found.processes > 1:
            raise ValueError(
                f"torchrun started {found.processes} processes, each of which would train alone with devices="
                f"{devices}: give --devices and --num_nodes so that their product is {found.processes}, or start one"
            )
        setattr(rank_zero_only, "rank", 0)  # noqa: B010  Lightning reads it from any launcher's variables
        return True
    if found is not None and found.name == "mpirun" and find_spec("mpi4py") is None:
        raise ValueError(
            f"mpirun started {found.processes} processes, which the trainer knows of with mpi4py alone: install it, or "
            "start them by torchrun --nproc_per_node DEVICES -m diffkd fit ..."
        )
    if found is not None:
        return found.rank == 0
    # Processes that the trainer itself starts, one for each further device, and environments set by hand.
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


def several_processes() -> bool:
    """Return whether a process group of more than one process has been set up."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, (N, ...), in the order of the ranks; their numbers may differ."""
    if not several_processes():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    numbers = [int(count) for count in counts]
    padded = torch.cat([rows, rows.new_zeros(max(numbers) - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in numbers]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Broadcast the buffers of rank 0, such as BatchNorm's running statistics, if training is distributed."""
    if several_processes():
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)


def strategy_for(strategy: str, devices: list[int] | int | str, num_nodes: int) -> str | Strategy:
    """Return the trainer's strategy; "auto" is DDP on several devices, "fsdp" PyTorch's own FSDP2."""
    if strategy == "fsdp":
        return ModelParallelStrategy(save_distributed_checkpoint=False)
    several = not single_process(devices, num_nodes) or devices in ("auto", -1, "-1")
    if strategy == "ddp" or (strategy == "auto" and several):
        # Buffers are broadcast before each validation instead, in which ranks may have different numbers of batches.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
        return DDPStrategy(**options)
    return strategy


def environments(devices: list[int] | int | str, num_nodes: int) -> list[ClusterEnvironment]:
    """Return the trainer's cluster environment; for one process, variables of launchers are ignored."""
    return [LightningEnvironment()] if single_process(devices, num_nodes) else []


def device_name(trainer: Trainer) -> str:
    """Return number and kind of a trainer's devices, such as "2 x cpu"."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} x {name}"


def shards(trainer: Trainer) -> bool:
    """Whether a trainer shards the parameters (FSDP)."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def shard(model: nn.Module, device: torch.device, processes: int) -> None:
    """Shard the parameters of a model over all ranks (FSDP2); they are gathered for the duration of each step.

    Raises:
        RuntimeError: if this PyTorch sums gradients over ranks on this device instead of averaging, as 2.8 on CPUs.
    """
    mesh = init_device_mesh(device.type, (processes,))
    probe = nn.Linear(1, 1, bias=False).to(device)
    fully_shard(probe, mesh=mesh)
    probe(torch.ones(1, 1, device=device)).sum().backward()
    if probe.weight.grad is None or full_tensor(probe.weight.grad).item() != 1:
        raise RuntimeError(
            f"PyTorch {torch.__version__} adds up the gradients of shards on a {device.type}, where their mean is "
            "wanted: take --strategy ddp, or a newer PyTorch"
        )
    model.to(memory_format=torch.contiguous_format)  # other formats cannot be sharded
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, a collective call; other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class UnshardedStudent:
    """A copy of a student with full weights on every rank, which each rank can run and save without communication.

    Not an `nn.Module`, so that it is neither a submodule, nor sharded, nor optimised.

    Args:
        student: copied before its parameters are sharded.
    """

    def __init__(self, student: nn.Module) -> None:
        self.model = copy.deepcopy(unwrap(student)).requires_grad_(False).eval()

    @torch.no_grad()
    def gather(self, student: nn.Module) -> None:
        """Copy the student's current weights; a collective call."""
        student = unwrap(student)
        for ours, theirs in (
            *zip(self.model.parameters(), student.parameters(), strict=True),
            *zip(self.model.buffers(), student.buffers(), strict=True),
        ):
            ours.copy_(full_tensor(theirs))
