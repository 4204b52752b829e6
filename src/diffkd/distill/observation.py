"""One pair in one batch: its two features as given to the method, and the method's result."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffkd.features.layout import resize
from diffkd.features.reader import Reader, compared_size
from diffkd.features.shape import Resizing


class Observation(NamedTuple):
    """One pair's features in a batch, each (B, C, H, W) or (B, C) or a list of these, and the method's result.

    For DiffKD, `result` is a :class:`~diffkd.DiffKDOutput` with the denoised feature.
    """

    student: Tensor | list[Tensor]
    teacher: Tensor | list[Tensor]
    result: Any


def as_constant(feature: Tensor) -> Tensor:
    """Return a teacher's feature detached, and usable in a loss even if it was computed in inference mode."""
    if not torch.compiler.is_compiling() and feature.is_inference():
        feature = feature.clone()  # autograd cannot save inference tensors for backward
    # A teacher may enable gradients inside its forward.
    return feature.detach()


def read_pair(
    student: Reader,
    teacher: Reader,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    resizes: Resizing = "student",
) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
    """Return the features of a pair from the outputs of both models' layers; single maps are resized by `resizes`.

    Lists of maps are not resized.
    """
    our_feature, their_feature = student.read(ours), teacher.read(theirs)
    if isinstance(our_feature, Tensor) and isinstance(their_feature, Tensor) and our_feature.ndim == 4:
        size = compared_size(tuple(our_feature.shape[2:]), tuple(their_feature.shape[2:]), resizes)
        if size is not None:
            our_feature, their_feature = (resize(one, (size[0], size[1])) for one in (our_feature, their_feature))
    return our_feature, their_feature


def select_arguments(method: nn.Module, pair: str, context: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that a method needs besides the features of its pair.

    Raises:
        TypeError: if one of them is missing in the context.
    """
    needed = getattr(method, "needs", ())
    missing = [need for need in needed if context.get(need) is None]
    if missing:
        raise TypeError(
            f"{type(method).__name__} of pair '{pair}' needs {', '.join(missing)}: call "
            f"distiller(images, {', '.join(f'{need}=...' for need in missing)})"
        )
    return {need: context[need] for need in needed}
