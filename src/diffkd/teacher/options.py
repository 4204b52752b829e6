"""How a frozen teacher runs: folded, in lower precision, with channels last."""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from diffkd.features.activations import before_activation
from diffkd.features.memory_layout import try_channels_last
from diffkd.features.recorder import split_selector
from diffkd.teacher.folding import fold_batchnorm

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TeacherOptions:
    """Say how the teacher is made to run faster, and what it was trained for; the default runs what was given.

    To run it otherwise makes a copy, and the module that was given stays as it is. What it was trained for is for
    :func:`~diffkd.training.fit.fit`, which builds it: a distiller of your own gets a `teacher_input` instead.

    Args:
        fold: put its BatchNorms into the convolutions before them: the same features up to rounding
            (:func:`~diffkd.teacher.folding.fold_batchnorm`).
        precision: "same" as it was given, or "bf16" or "fp16" for weights and activations; methods then get its
            features in float32. It saves memory and, on hardware that has such arithmetic, time.
        channels_last: lay out its weights, and so its activations, with the channels last in memory, for hardware whose
            convolutions are faster then; a teacher that does not run like that stays as it is.
        mean: of the images it was trained with, per channel, in the units of the data's; None: what its card, the file
            beside its weights or its library says, and else that of the data.
        std: likewise; given with `mean`.
        image_size: side of the square images it gets, in pixels; None: what its card says or the model demands, and
            else that of the student's.
        classes: names of its classes in the order of its scores; of the data's names in another order its scores are
            brought into that of the data. None: what its card or its library says.

    Raises:
        ValueError: if `precision` is none of these, or mean, std, image_size or classes cannot be meant.
    """

    fold: bool = False
    precision: Literal["same", "bf16", "fp16"] = "same"
    channels_last: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std", "classes"):  # files of values hold lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError(
                f"the teacher's mean {self.mean} and std {self.std} go together: one value each per channel"
            )
        if self.std is not None and min(self.std, default=0) <= 0:
            raise ValueError(f"the teacher's std {self.std} must be above 0")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"the teacher's image_size={self.image_size} is no side in pixels")
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("the teacher's classes name one twice: give each name once, in the order of its scores")
        if self.precision != "same" and self.precision not in _TYPES:
            raise ValueError(f"the teacher's precision is {self.precision!r}; it must be 'same', 'bf16' or 'fp16'")

    @property
    def running(self) -> "TeacherOptions":
        """How it runs, without what it was trained for."""
        return TeacherOptions(self.fold, self.precision, self.channels_last)

    @property
    def lowers(self) -> bool:
        """Whether its features come in fewer bits than methods are to get."""
        return self.precision != "same"


AS_GIVEN = TeacherOptions()


def prepare_teacher(teacher: nn.Module, example: Any, keep: Collection[str], options: TeacherOptions) -> nn.Module:
    """Return the teacher as `options` say: itself, or a copy.

    Args:
        teacher: in evaluation mode.
        example: its input.
        keep: names of the layers, or of elements of their outputs, that are wanted.
        options: what to do.

    Raises:
        ValueError: if it is compiled already and would have to be changed.
    """
    if options.running == AS_GIVEN:
        return teacher
    if hasattr(teacher, "_orig_mod"):
        raise ValueError(
            f"the teacher is compiled already and cannot be changed as {options} says; give the model itself"
        )
    if not options.fold:
        made = copy.deepcopy(teacher)
    else:
        made, _ = fold_batchnorm(
            teacher, example, keep={split_selector(before_activation(name)[0])[0] for name in keep}
        )
    if options.channels_last:
        try_channels_last(made, example)
    if options.lowers:
        # Afterwards: folded weights are rounded once.
        made = made.to(_TYPES[options.precision])
    return made
