"""Steps of several batches: which batches belong to one, where the trainer accumulates gradients."""

import math

from lightning.pytorch import Trainer


def first_of_step(trainer: Trainer, batch: int) -> int:
    """Return the first batch of the step that a batch of the epoch belongs to, both counted from 0."""
    return batch - batch % trainer.accumulate_grad_batches


def ends_step(trainer: Trainer, batch: int) -> bool:
    """Whether the optimiser steps after this batch of the epoch."""
    return (batch + 1) % trainer.accumulate_grad_batches == 0 or batch + 1 == trainer.num_training_batches


def batches_of_step(trainer: Trainer, batch: int) -> int:
    """Return how many batches the step has that a batch belongs to: the last one of an epoch may have fewer."""
    left = trainer.num_training_batches - first_of_step(trainer, batch)
    return int(min(trainer.accumulate_grad_batches, left))


def steps_per_epoch(trainer: Trainer) -> int:
    """Return how often the optimiser steps in an epoch."""
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
