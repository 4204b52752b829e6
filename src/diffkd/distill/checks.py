"""Checks of the distiller: which models can be student and teacher, and whether gradients reach the student."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffkd.distill.matching import Pair
from diffkd.features.calling import evaluation_mode
from diffkd.files.weights import unwrap


def check_models(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError if the models share what is trained, have weights without values, or are programs."""
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
    """Where a parameter's values lie, or which object it is, if that cannot be told."""
    try:
        return parameter.data_ptr() or id(parameter)
    except (RuntimeError, ValueError):  # it is lazy, sparse, or wraps other tensors
        return id(parameter)


def _check_modes(side: str, model: object) -> None:
    """Raise ValueError if a model is what torch.export makes: it has no layers, and cannot be put into evaluation."""
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
    """Raise ValueError, naming the first, if weights of a model have no values: they are on the device "meta"."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} of the {side} {type(unwrap(model)).__name__} has no values, on the device 'meta': call "
                "model.to_empty(device='cpu') and load its weights first"
            )


class GradientWarning(UserWarning):
    """A feature carries no gradient to the student, so that the student learns nothing from it."""


class GradientFlow:
    """Looks at the student's features in training, and warns of each pair once.

    Args:
        names: of the pairs.
        pairs: of layers.
    """

    def __init__(self, names: Sequence[str], pairs: Sequence[Pair]) -> None:
        self.layers = {name: pair.student_names for name, pair in zip(names, pairs, strict=True)}
        self.missing: dict[str, tuple[str, ...]] = {}
        self._warned: set[str] = set()

    def look(self, features: Mapping[str, Tensor]) -> None:
        """Take in the student's features by layer, as they came out of a forward with gradients switched on."""
        found = {
            name: tuple(layer for layer in layers if not features[layer].requires_grad)
            for name, layers in self.layers.items()
        }
        self.missing = {name: layers for name, layers in found.items() if layers}
        if torch.compiler.is_compiling():
            return  # a graph cannot warn; :meth:`check` still tells
        for name, layers in self.missing.items():
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(_explain(name, layers), GradientWarning, stacklevel=4)

    def check(self) -> None:
        """Raise ValueError if a pair had no gradient at all, not even from one of several layers."""
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
