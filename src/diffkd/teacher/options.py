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
    """Say how the teacher is made to run faster; the default runs the very module that was given.

    Any other choice makes a copy, and the module that was given stays as it is.

    Args:
        fold: put its BatchNorms into the convolutions before them: the same features up to rounding
            (:func:`~diffkd.teacher.folding.fold_batchnorm`).
        precision: "same" as it was given, or "bf16" or "fp16" for weights and activations; methods then get its
            features in float32. It saves memory and, on hardware that has such arithmetic, time.
        channels_last: lay out its weights, and so its activations, with the channels last in memory, for hardware whose
            convolutions are faster then; a teacher that does not run like that stays as it is.

    Raises:
        ValueError: if `precision` is none of these.
    """

    fold: bool = False
    precision: Literal["same", "bf16", "fp16"] = "same"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.precision != "same" and self.precision not in _TYPES:
            raise ValueError(f"the teacher's precision is {self.precision!r}; it must be 'same', 'bf16' or 'fp16'")

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
    if options == AS_GIVEN:
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
