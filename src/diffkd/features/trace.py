"""The trace of one forward of a model: the output of each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.features.activations import Activation, ActivationTrace
from diffkd.features.forward import evaluation_mode, run, shapes_of
from diffkd.features.layout import select_tensor

OUTPUT = "output"
"""The name of the whole model's output."""

_OF_MAPS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)  # (B, C, H, W) and nothing else
_PROBABILITIES = (nn.Sigmoid, nn.LogSigmoid, nn.Softmax, nn.Softmax2d, nn.LogSoftmax)


@dataclass
class Seen:
    """The output of one call of a layer.

    Attributes:
        name: dotted name.
        type: name of its class.
        tensor: its output, or the tensor selected from it.
        version: version counter of the tensor (in-place changes) at that time.
        elements: the tensors in an output that is a sequence or mapping of several, by name ("fpn[0]").
        grid: (H, W) of its positions, if the layer's type determines them.
        may_score: whether it has a weight matrix, or is a softmax or sigmoid.
        keeps_shape: whether it is a normalisation or activation: a single layer with `may_score` False that returns
            another tensor of the shape of its input.
        position: number of layers that had finished by then.
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
        """Whether the tensor has not been overwritten in place since the layer returned it."""
        return version_of(self.tensor) == self.version


def run_watched(model: nn.Module, example: Any) -> tuple[Any, list[Seen]]:
    """Run the model once, in evaluation mode and without gradients.

    Returns:
        Its output, and one entry per call of each layer that returned a tensor.

    Raises:
        ValueError: if the model cannot take the example.
    """
    seen: list[Seen] = []
    trace = ActivationTrace()
    handles = []
    for name, module in model.named_modules():
        if name not in ("", OUTPUT) and not isinstance(module, torch.jit.ScriptModule):  # they take no hooks
            handles.append(module.register_forward_pre_hook(_entry_hook(name, trace)))
            handles.append(module.register_forward_hook(_probe_hook(name, seen, trace)))
    try:
        # Compiled parts run eagerly: a graph compiled before does not contain these hooks.
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
    # An element may itself be nested, such as (map, mask): its selected tensor is used.
    tensors = ((key, select_tensor(value)) for key, value in named)
    found = {f"{name}[{key}]": tensor for key, tensor in tensors if tensor is not None}
    return found if len(found) > 1 else {}


def by_name(output: Any, seen: Sequence[Seen]) -> dict[str, Tensor]:
    """Return all outputs by name: of each layer's last call, of the model, and the elements of both."""
    layers = {name: tensor for one in seen for name, tensor in (one.elements | {one.name: one.tensor}).items()}
    result = select_tensor(output)
    return layers | elements_of(OUTPUT, output) | ({} if result is None else {OUTPUT: result})


def is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and memory address."""
    return tensor.shape == other.shape and tensor.data_ptr() == other.data_ptr()


def version_of(tensor: Tensor) -> int:
    """The version counter of a tensor (in-place changes), 0 for inference tensors and while compiling."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
