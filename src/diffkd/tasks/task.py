"""The protocol of a task: batch to inputs, losses and measurements."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffkd.files.history import Row

TASK = "task"
"""The name of the task's own loss, and the first part of the names of its terms."""


@dataclass(frozen=True)
class Step:
    """One batch made ready.

    Attributes:
        inputs: of the student, as :class:`~diffkd.Distiller` takes them: a tensor, a tuple of arguments or a mapping.
        images: the pixels among them, which are checked to be finite.
        targets: what the task's loss compares the output with.
        context: what methods may need besides features, such as "labels" and "indices".
    """

    inputs: Any
    images: Tensor | list[Tensor]
    targets: Any
    context: Mapping[str, Any] = field(default_factory=dict)


class Meter(Protocol):
    """Collects the measurements of one model over a data set, over all processes."""

    def update(self, model: nn.Module, batch: Any) -> None:
        """Run `model`, which is in evaluation mode, on a batch and take in how well it does."""

    def compute(self) -> Row:
        """Return the measurements by name, and begin anew."""


class Task(Protocol):
    """A kind of problem: image classification, object detection or semantic segmentation.

    Attributes:
        name: "classification", "detection" or "segmentation".
        headlines: names of the measurements to show while training; the first decides which epoch is best. All
            measurements but "loss" are shares of 1, and larger is better.
    """

    @property
    def name(self) -> str:
        """Name of the task."""

    @property
    def headlines(self) -> tuple[str, ...]:
        """Names of the measurements that are shown; the first decides."""

    def step(self, batch: Any, seed: int) -> Step:
        """Make a training batch ready; all randomness follows from `seed`."""

    def losses(self, output: Any, step: Step) -> dict[str, Tensor]:
        """Return the losses of what the student returned, their names "task" or beginning with "task/"."""

    def meter(self, device: torch.device) -> Meter:
        """Return something that measures a model on `device`."""

    def judge(self, teacher: Callable[[Any], Any], batch: Any) -> tuple[float, float] | None:
        """Return how well a teacher does on a training batch, as a share, and what chance would; None if unknown.

        `teacher` takes the student's images and is in evaluation mode.
        """
