"""One pair in one batch: its two features as they are compared, and the result of its method."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffkd.features.layout import resize
from diffkd.features.reader import Reader, compared_size
from diffkd.features.shape import Resizing


class Observation(NamedTuple):
    """One pair's features in a batch, each (B, C, H, W) or (B, C), or a list of such, and what its method returned.

    For DiffKD, `result` is a :class:`~diffkd.DiffKDOutput` with the denoised feature.
    """

    student: Tensor | list[Tensor]
    teacher: Tensor | list[Tensor]
    result: Any


def as_constant(feature: Tensor) -> Tensor:
    """Return a teacher's feature as a tensor without gradient, that a loss can use, be it made in inference mode."""
    if not torch.compiler.is_compiling() and feature.is_inference():
        feature = feature.clone()  # no backward may keep the other
    # A teacher may switch gradients on again, for what it computes from gradients of its own.
    return feature.detach()


def read_pair(
    student: Reader,
    teacher: Reader,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    resizes: Resizing = "student",
) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
    """Return the features of a pair from the outputs of both models' layers, single maps resized as the method wants.

    Lists of maps are left as they are.
    """
    our_feature, their_feature = student.read(ours), teacher.read(theirs)
    if isinstance(our_feature, Tensor) and isinstance(their_feature, Tensor) and our_feature.ndim == 4:
        size = compared_size(tuple(our_feature.shape[2:]), tuple(their_feature.shape[2:]), resizes)
        if size is not None:
            our_feature, their_feature = (resize(one, (size[0], size[1])) for one in (our_feature, their_feature))
    return our_feature, their_feature


def handed_to(method: nn.Module, pair: str, context: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a method needs besides the features of its pair.

    Raises:
        TypeError: if the context lacks some of it.
    """
    needed = getattr(method, "needs", ())
    missing = [need for need in needed if context.get(need) is None]
    if missing:
        raise TypeError(
            f"{type(method).__name__} of pair '{pair}' needs {', '.join(missing)}: call "
            f"distiller(images, {', '.join(f'{need}=...' for need in missing)})"
        )
    return {need: context[need] for need in needed}
