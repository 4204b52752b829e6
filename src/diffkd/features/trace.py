"""The trace of one run of a model: what each of its layers returned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.features.activations import Activation, ActivationTrace
from diffkd.features.calling import evaluation_mode, run, shapes_of
from diffkd.features.layout import select_tensor

OUTPUT = "output"
"""The name that stands for what the whole model returns."""

_OF_MAPS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)  # (B, C, H, W) and nothing else
_PROBABILITIES = (nn.Sigmoid, nn.LogSigmoid, nn.Softmax, nn.Softmax2d, nn.LogSoftmax)


@dataclass
class Seen:
    """What a layer returned when it ran.

    Attributes:
        name: dotted name.
        type: name of its class.
        tensor: what it returned, or the tensor meant in it.
        version: how often the tensor had been changed in place by then.
        elements: the tensors in an output that is a sequence or mapping of several, by name ("fpn[0]").
        grid: (H, W) of its positions, where the layer's type leaves no doubt of them.
        may_score: whether it has a matrix of weights, or makes probabilities of scores.
        keeps_shape: whether it is a normalisation or activation: a single layer, not one of these, that returns another
            tensor of the shape that it was given.
        position: how many layers had finished by then.
        before: the activation whose input stands for the output before its activation; None if there is none.
    """

    name: str
    type: str
    tensor: Tensor
    version: int
    elements: dict[str, Tensor]
    grid: tuple[int, int] | None
    may_score: bool
    keeps_shape: bool
    position: int = 0
    before: Activation | None = None

    @property
    def intact(self) -> bool:
        """Whether the tensor is still what the layer returned: nothing has overwritten it in place."""
        return version_of(self.tensor) == self.version


def run_watched(model: nn.Module, example: Any) -> tuple[Any, list[Seen]]:
    """Run the model once, in evaluation mode and without gradients.

    Returns:
        Its output, and what each layer returned that returned a tensor, as often as it ran.

    Raises:
        ValueError: if the model cannot take the example.
    """
    seen: list[Seen] = []
    trace = ActivationTrace()
    handles = []
    for name, module in model.named_modules():
        if name not in ("", OUTPUT) and not isinstance(module, torch.jit.ScriptModule):  # which take no hooks
            handles.append(module.register_forward_pre_hook(_entry_hook(name, trace)))
            handles.append(module.register_forward_hook(_probe_hook(name, seen, trace)))
    try:
        # What is compiled runs as it is written: a graph from before knows nothing of these hooks.
        with evaluation_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), trace:
            output = run(model, example)
        for one in seen:
            one.before = trace.before(one.name, one.tensor, one.version, one.position)
        return output, seen
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ValueError(
            f"{type(model).__name__} cannot take an example of shape {shapes_of(example)} "
            f"({type(error).__name__}: {reason}); give the example as the model is called in training"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _entry_hook(name: str, trace: ActivationTrace) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        trace.enter(name, module, args)

    return hook


def _probe_hook(name: str, seen: list[Seen], trace: ActivationTrace) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        position = trace.position
        trace.leave(name, module, output)
        tensor = select_tensor(output)
        if tensor is not None:
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.inplace:
                tensor.mul_(1)  # it overwrites its input in training, and does nothing in evaluation
            grid = (tensor.shape[2], tensor.shape[3]) if isinstance(module, _OF_MAPS) and tensor.ndim == 4 else None
            may_score = isinstance(module, _PROBABILITIES) or getattr(getattr(module, "weight", None), "ndim", 0) > 1
            given = args[0] if args and isinstance(args[0], Tensor) else None
            changed = given is not None and (given is not tensor or bool(getattr(module, "inplace", False)))
            single = not may_score and next(module.children(), None) is None
            keeps_shape = single and changed and given is not None and given.shape == tensor.shape
            kind, elements = type(module).__name__, elements_of(name, output)
            seen.append(Seen(name, kind, tensor, version_of(tensor), elements, grid, may_score, keeps_shape, position))

    return hook


def elements_of(name: str, output: Any) -> dict[str, Tensor]:
    """Return the tensors in a layer's output by name ("fpn[0]"), if there are several."""
    named: Sequence[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        named = list(output.items())
    elif isinstance(output, (list, tuple)):
        named = list(enumerate(output))
    # An element may hold a tensor among other things, as (map, mask) does, and stands for that then.
    tensors = ((key, select_tensor(value)) for key, value in named)
    found = {f"{name}[{key}]": tensor for key, tensor in tensors if tensor is not None}
    return found if len(found) > 1 else {}


def by_name(output: Any, seen: Sequence[Seen]) -> dict[str, Tensor]:
    """Return all that a run returned: of each layer where it ran last, of the model, and the elements of both."""
    layers = {name: tensor for one in seen for name, tensor in (one.elements | {one.name: one.tensor}).items()}
    result = select_tensor(output)
    return layers | elements_of(OUTPUT, output) | ({} if result is None else {OUTPUT: result})


def is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one in memory."""
    return tensor.shape == other.shape and tensor.data_ptr() == other.data_ptr()


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been changed in place, where that is counted."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
