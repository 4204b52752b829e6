"""Options of a frozen teacher: folding, precision, memory format, images and classes."""

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
    """Options that make the teacher run faster, and the normalisation, size and classes that it was trained with.

    If an option changes the teacher, a copy is made; the given module is not modified. `mean`, `std`, `image_size` and
    `classes` are for :func:`~diffkd.training.fit.fit`, which builds the teacher; for your own distiller use
    `teacher_input` instead.

    Args:
        fold: fold its BatchNorms into the convolutions before them: the same features up to rounding
            (:func:`~diffkd.teacher.folding.fold_batchnorm`).
        precision: "same" as given, or "bf16" or "fp16" for weights and activations; methods then get its features in
            float32. It saves memory and, on hardware with such arithmetic, time.
        channels_last: use the channels_last memory format, in which convolutions are faster on some hardware; a teacher
            that does not run in it stays unchanged.
        mean: per channel, of the normalisation that it was trained with, in the units of the data's; None: from its
            card, the file beside its weights or its library, else that of the data.
        std: likewise; given with `mean`.
        image_size: side of its square input images in pixels; None: from its card or as the model requires, else that
            of the student's.
        classes: names of its classes in the order of its scores; if they are the data's names in another order, its
            scores are reordered as in the data. None: from its card or its library.

    Raises:
        ValueError: if `precision` is unknown, or mean, std, image_size or classes are invalid.
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
        """The options of running it, without mean, std, image_size and classes."""
        return TeacherOptions(self.fold, self.precision, self.channels_last)

    @property
    def lowers(self) -> bool:
        """Whether its features are in half precision and must be cast for the methods."""
        return self.precision != "same"


AS_GIVEN = TeacherOptions()


def prepare_teacher(teacher: nn.Module, example: Any, keep: Collection[str], options: TeacherOptions) -> nn.Module:
    """Apply `options` to the teacher; return it, or a changed copy.

    Args:
        teacher: in evaluation mode.
        example: its input.
        keep: names of the layers, or of elements of their outputs, whose outputs must not change.
        options: the options.

    Raises:
        ValueError: if it is already compiled and an option would change it.
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
        # After folding, so that weights are rounded only once.
        made = made.to(_TYPES[options.precision])
    return made
