"""The protocol of a task: inputs from batches, losses and metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffkd.files.history import Row

TASK = "task"
"""The name of the task's own loss, and the prefix of its terms."""


@dataclass(frozen=True)
class Step:
    """One batch, prepared for a training step.

    Attributes:
        inputs: input of the student, as for :class:`~diffkd.Distiller`: a tensor, a tuple of arguments or a mapping.
        images: the images in it, which are checked to be finite.
        targets: targets of the task's loss.
        context: keyword arguments of methods besides features, such as "labels" and "indices".
    """

    inputs: Any
    images: Tensor | list[Tensor]
    targets: Any
    context: Mapping[str, Any] = field(default_factory=dict)


class Meter(Protocol):
    """Computes the metrics of one model over a data set, over all ranks."""

    def update(self, model: nn.Module, batch: Any) -> None:
        """Run `model`, which is in evaluation mode, on a batch and update the metrics."""

    def compute(self) -> Row:
        """Return the metrics by name, and reset."""


class Task(Protocol):
    """A kind of problem: image classification, object detection, semantic segmentation or representation.

    Attributes:
        name: "classification", "detection", "segmentation" or "representation".
        headlines: names of the metrics to show while training; the first one selects the best epoch. All metrics but
            "loss" are in 0..1, and larger is better.
        metrics: names of all that may be measured after an epoch, those of single classes or teachers ("cka/1") aside.
    """

    @property
    def name(self) -> str:
        """Name of the task."""

    @property
    def headlines(self) -> tuple[str, ...]:
        """Names of the metrics that are shown; the first selects the best epoch."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that may be measured."""

    def step(self, batch: Any, seed: int) -> Step:
        """Prepare a training batch; `seed` determines all random numbers."""

    def losses(self, output: Any, step: Step) -> dict[str, Tensor]:
        """Return the losses of the student's output by name, "task" or with the prefix "task/"."""

    def meter(self, device: torch.device, *, last: bool = False) -> Meter:
        """Return the meter of a model on `device`; `last`: nothing is trained afterwards, so that it may take long."""

    def judge(self, teacher: Callable[[Any], Any], batch: Any) -> tuple[float, float] | None:
        """Return a teacher's score on a training batch, in 0..1, and that by chance; None if unknown.

        `teacher` takes the student's images and is in evaluation mode.
        """
