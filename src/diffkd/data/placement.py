"""Where batches are wanted: the device and rank of the trainer that a data module is attached to."""

from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Placement:
    """Name the place of one process.

    Args:
        device: where the model runs.
        rank: this process among `world_size`.
        world_size: number of processes.
    """

    device: torch.device
    rank: int
    world_size: int


def placement(trainer: Trainer | None) -> Placement:
    """Return the trainer's device, rank and world size; without a trainer the CPU, 0 and 1."""
    if trainer is None:
        return Placement(torch.device("cpu"), rank=0, world_size=1)
    return Placement(trainer.strategy.root_device, rank=trainer.global_rank, world_size=trainer.world_size)
