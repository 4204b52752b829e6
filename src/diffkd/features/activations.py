"""Detection of activations in a network, and recording of the value before one of them.

`layer3@pre` names the input of the activation at the end of `layer3`. If the layer does not end in an activation
(pre-activation networks), it names the input of the next activation, with at most a normalisation between: `layer1@pre`
of a Wide ResNet is the output of the BatchNorm that follows `layer1`. The activation may be a module, called once or
several times, or a function such as `F.relu`, in place or not. If activated maps are concatenated and shuffled
afterwards, as in ShuffleNetV2, the same operations are applied to the values before the activations.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRE = "@pre"
"""Suffix of a layer's name for the value before its activation."""

ACTIVATIONS = frozenset(
    {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "prelu", "elu", "elu_", "silu"}
    | {"gelu", "hardswish", "mish", "selu", "selu_", "celu", "celu_", "softplus"}
)
MOVES = frozenset({"cat", "channel_shuffle", "view", "reshape", "transpose", "permute", "contiguous"})
"""Operations that concatenate or rearrange values without changing them."""
NORMALISATIONS = frozenset({"batch_norm", "group_norm", "layer_norm", "instance_norm"})


@dataclass(frozen=True)
class Activation:
    """One call of an activation in the probed forward.

    Attributes:
        module: dotted name of the activation's module; for a function that of the innermost module whose forward calls
            it, "" for the model itself.
        call: index of the call, from 0: of the module, or of any activation function within the calling module.
        is_function: whether it is a function call.
        norm: dotted name of the BatchNorm right before it, on the same path and not in a shortcut; "" if there is none.
        moved: whether the layer concatenates or rearranges the activation's output; `module` is then the layer itself.
    """

    module: str
    call: int
    is_function: bool = False
    norm: str = ""
    moved: bool = False


def before_activation(name: str) -> tuple[str, bool]:
    """Split "layer3@pre" into the layer's name and whether it has the suffix."""
    return (name.removesuffix(PRE), True) if name.endswith(PRE) else (name, False)


def moved_from(name: str, args: Sequence[Any], find: Callable[[Tensor], Tensor | None]) -> list[Any] | None:
    """Return the arguments of an operation of :data:`MOVES` with tensors replaced by `find`; None if none is."""
    if name == "cat":
        parts = [find(one) for one in args[0]]
        if all(part is None for part in parts):
            return None
        joined = [one if part is None else part for one, part in zip(args[0], parts, strict=True)]
        return [joined, *args[1:]]
    part = find(args[0]) if args and isinstance(args[0], Tensor) else None
    return None if part is None else [part, *args[1:]]


def works_in_place(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an activation function overwrites its argument."""
    return name.endswith("_") or bool(kwargs.get("inplace", False)) or any(value is True for value in args[1:])


@dataclass
class _Step:
    """A call of an activation or of a normalisation in a run."""

    given: Tensor
    made: Tensor
    version: int  # of `made`, right after the call
    position: int  # how many layers had finished by then
    activation: Activation | None  # None: a normalisation


class ActivationTrace(TorchFunctionMode):
    """Records every activation and normalisation of one forward, and the module that called it.

    Call :meth:`enter` and :meth:`leave` around every module.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stack: list[tuple[str, nn.Module, Any]] = [("", nn.Module(), None)]
        self._steps: list[_Step] = []
        self._module_calls: Counter[str] = Counter()
        self._function_calls: Counter[str] = Counter()
        self._moved: list[Tensor] = []  # results of concatenating and rearranging activated values
        self._norms: list[tuple[str, int]] = []  # those that ran, with the channels of their output
        self.position = 0

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        """Record that a module is called."""
        self._stack.append((name, module, args[0] if args else None))

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        """Record that a module has returned."""
        while len(self._stack) > 1 and self._stack.pop()[0] != name:
            pass  # a module whose hooks did not run
        self._module_calls[name] += 1
        if isinstance(output, Tensor) and output.ndim > 1 and is_batchnorm(module):
            self._norms.append((name, output.shape[1]))
        self.position += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record activations, normalisations and moves."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        made = func(*args, **kwargs)
        if name in MOVES and isinstance(made, Tensor) and moved_from(name, args, self._activated) is not None:
            self._moved.append(made)
        if name not in ACTIVATIONS and name not in NORMALISATIONS:
            return made
        given = args[0] if args else kwargs.get("input")
        if isinstance(given, Tensor) and isinstance(made, Tensor):
            activation = self._located(given) if name in ACTIVATIONS else None
            version = 0 if made.is_inference() else made._version
            self._steps.append(_Step(given, made, version, self.position, activation))
        return made

    def _activated(self, tensor: Tensor) -> Tensor | None:
        made = any(step.activation is not None and step.made is tensor for step in self._steps)
        return tensor if made or any(one is tensor for one in self._moved) else None

    def _located(self, given: Tensor) -> Activation:
        name, module, argument = self._stack[-1]
        around = [entry[0] for entry in self._stack]
        calls = self._function_calls[name]
        self._function_calls.update(around)
        is_module = name != "" and argument is given and next(module.children(), None) is None
        parent = name.rpartition(".")[0] if is_module else name
        norm = self._norm_in(parent, given)
        if is_module:
            return Activation(name, self._module_calls[name], False, norm)
        return Activation(name, calls, True, norm)

    def _norm_in(self, parent: str, given: Tensor) -> str:
        """Return the name of the last BatchNorm at the activation's level; those inside a shortcut are deeper."""
        around = next((name for name, module, _ in reversed(self._stack) if name and is_batchnorm(module)), "")
        if around:
            return around  # a normalisation that contains its activation
        channels = given.shape[1] if given.ndim > 1 else 0
        beside = [one for one, width in self._norms if width == channels and one.rpartition(".")[0] == parent]
        return beside[-1] if beside else ""

    def before(self, layer: str, tensor: Tensor, version: int, position: int) -> Activation | None:
        """Return the activation whose input `@pre` denotes for a layer's output.

        Args:
            layer: name of the layer.
            tensor: its output.
            version: the output's version counter (in-place changes) when the layer returned it.
            position: number of layers that had finished by then.
        """
        earlier = [step for step in self._steps if step.position <= position and step.activation is not None]
        for step in reversed(earlier):
            if step.made is tensor and step.version == version:
                return step.activation
        given = tensor
        for step in self._steps:
            if step.position > position and step.given is given:
                if step.activation is not None:
                    return step.activation
                given = step.made
        return Activation(layer, 0, True, moved=True) if any(one is tensor for one in self._moved) else None


class CalledActivations(TorchFunctionMode):
    """Calls a listener for every activation function, and for operations of :data:`MOVES` on its result.

    Args:
        listener: an object with methods `called(given, in_place)` before an activation, `activated(made)` after it, and
            `moved(name, args, apply, made)` after an operation of :data:`MOVES`; `apply` repeats it on other arguments.
    """

    def __init__(self, listener: Any) -> None:
        super().__init__()
        self.listener = listener

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and call the listener."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ACTIVATIONS:
            given = args[0] if args else kwargs["input"]
            self.listener.called(given, works_in_place(name, args, kwargs))
            made = func(*args, **kwargs)
            self.listener.activated(made)
            return made
        made = func(*args, **kwargs)
        if name in MOVES:
            self.listener.moved(name, args, lambda changed: func(*changed, **kwargs), made)
        return made


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm over maps with scale and shift, frozen or not, of any library."""
    held = isinstance(getattr(module, "weight", None), Tensor) and isinstance(getattr(module, "bias", None), Tensor)
    return held and isinstance(getattr(module, "running_mean", None), Tensor)
