"""Checks of the distiller: valid models for student and teacher, and gradients that reach the student."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffkd.distill.matching import Pair
from diffkd.features.forward import evaluation_mode
from diffkd.files.weights import unwrap


def check_models(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError if the models share trained parameters, have meta tensors, or come from torch.export."""
    _check_modes("student", student)
    _check_modes("teacher", teacher)
    # By memory, not by object: a state dict loaded with assign=True shares it between two parameters.
    trained = {_memory(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if unwrap(student) is unwrap(teacher) or any(_memory(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError(
            "student and teacher share parameters: training the student would change the teacher; "
            "copy.deepcopy one of them"
        )
    _check_values("student", student)
    _check_values("teacher", teacher)


def _memory(parameter: Tensor) -> int:
    """The address of a parameter's memory, or the object's id if it has none."""
    try:
        return parameter.data_ptr() or id(parameter)
    except (RuntimeError, ValueError):  # lazy, sparse, or a wrapper of other tensors
        return id(parameter)


def _check_modes(side: str, model: object) -> None:
    """Raise ValueError if a model comes from torch.export: it has no layers and no evaluation mode."""
    try:
        if isinstance(model, nn.Module):
            with evaluation_mode(model):
                return
    except NotImplementedError:
        pass
    raise ValueError(
        f"the {side} is of type {type(model).__name__}, and no nn.Module with layers and modes of its own: give the "
        "model itself, or, of a program of torch.export, what torch.export.unflatten(program) makes of it"
    )


def _check_values(side: str, model: nn.Module) -> None:
    """Raise ValueError, naming the first, if weights of a model are on the device "meta" (without values)."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} of the {side} {type(unwrap(model)).__name__} has no values, on the device 'meta': call "
                "model.to_empty(device='cpu') and load its weights first"
            )


class GradientWarning(UserWarning):
    """A feature carries no gradient to the student, so that the student learns nothing from it."""


class GradientFlow:
    """Checks that the student's features carry gradients in training, and warns once per pair.

    Args:
        names: of the pairs.
        pairs: of layers.
    """

    def __init__(self, names: Sequence[str], pairs: Sequence[Pair]) -> None:
        self.layers = {name: pair.student_names for name, pair in zip(names, pairs, strict=True)}
        self.missing: dict[str, tuple[str, ...]] = {}
        self._warned: set[str] = set()

    def observe(self, features: Mapping[str, Tensor]) -> None:
        """Check the student's features by layer, from a forward with gradients enabled."""
        found = {
            name: tuple(layer for layer in layers if not features[layer].requires_grad)
            for name, layers in self.layers.items()
        }
        self.missing = {name: layers for name, layers in found.items() if layers}
        if torch.compiler.is_compiling():
            return  # a compiled graph cannot warn; :meth:`check` still raises
        for name, layers in self.missing.items():
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(_explain(name, layers), GradientWarning, stacklevel=4)

    def check(self) -> None:
        """Raise ValueError if none of a pair's features carries a gradient."""
        for name, layers in self.missing.items():
            if layers == self.layers[name]:
                raise ValueError(_explain(name, layers))


def _explain(pair: str, layers: Sequence[str]) -> str:
    which = ", ".join(f"'{layer}'" for layer in layers)
    return (
        f"pair '{pair}': the output of the student's {which} carries no gradient, so the student learns nothing from "
        "it. Either all parameters up to there are frozen, or they run under torch.no_grad or in "
        "torch.utils.checkpoint with use_reentrant=True; unfreeze them, checkpoint with use_reentrant=False, or pair a "
        "later layer"
    )
