"""Where a network applies its activations, and how the value before one of them is recorded.

`layer3@pre` names what the activation is applied to that makes the output of `layer3`. Where that output is not
activated (networks that normalise and activate before each convolution), it names what the next activation is applied
to, with at most a normalisation between: then `layer1@pre` of a Wide ResNet is the output of the BatchNorm that follows
`layer1`. The activation may be a module, called once or several times, or a function such as `F.relu`, in place or not.
Where activated maps are joined with others and shuffled afterwards, as ShuffleNetV2 does, the values before are joined
and shuffled in their place.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRE = "@pre"
"""What follows the name of a layer to name the value before its activation."""

ACTIVATIONS = frozenset(
    {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "prelu", "elu", "elu_", "silu"}
    | {"gelu", "hardswish", "mish", "selu", "selu_", "celu", "celu_", "softplus"}
)
MOVES = frozenset({"cat", "channel_shuffle", "view", "reshape", "transpose", "permute", "contiguous"})
"""Operations that join or rearrange values and leave them as they are."""
NORMALISATIONS = frozenset({"batch_norm", "group_norm", "layer_norm", "instance_norm"})


@dataclass(frozen=True)
class Activation:
    """One call of an activation, as the probe saw it.

    Attributes:
        module: dotted name of the activation's module; of a called function that of the innermost module whose forward
            calls it, "" for the model itself.
        call: which call it is, from 0: of the module, or of any activation while the calling module runs.
        is_function: whether it is a called function.
        norm: dotted name of the BatchNorm right before it, on the same path and not in a shortcut; "" if there is none.
        moved: whether the layer joins or rearranges what the activation returns; `module` is the layer itself then.
    """

    module: str
    call: int
    is_function: bool = False
    norm: str = ""
    moved: bool = False


def before_activation(name: str) -> tuple[str, bool]:
    """Split "layer3@pre" into the layer's name and whether the value before its activation is meant."""
    return (name.removesuffix(PRE), True) if name.endswith(PRE) else (name, False)


def moved_from(name: str, args: Sequence[Any], find: Callable[[Tensor], Tensor | None]) -> list[Any] | None:
    """Return the arguments of an operation of :data:`MOVES` with tensors replaced as `find` says; None if none is."""
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
    """Notes every activation and normalisation of one run, and where in the model it was called.

    Its methods :meth:`enter` and :meth:`leave` are to be called around every module.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stack: list[tuple[str, nn.Module, Any]] = [("", nn.Module(), None)]
        self._steps: list[_Step] = []
        self._module_calls: Counter[str] = Counter()
        self._function_calls: Counter[str] = Counter()
        self._moved: list[Tensor] = []  # what was made of activated values by joining and rearranging them
        self._norms: list[tuple[str, int]] = []  # those that ran, with the channels of their output
        self.position = 0

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        """Note that a module is called."""
        self._stack.append((name, module, args[0] if args else None))

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        """Note that a module has returned."""
        while len(self._stack) > 1 and self._stack.pop()[0] != name:
            pass  # a module whose hooks were skipped
        self._module_calls[name] += 1
        if isinstance(output, Tensor) and output.ndim > 1 and is_batchnorm(module):
            self._norms.append((name, output.shape[1]))
        self.position += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note it if it is of interest."""
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
        """Name the BatchNorm that last ran beside the activation: those inside of a shortcut lie deeper."""
        around = next((name for name, module, _ in reversed(self._stack) if name and is_batchnorm(module)), "")
        if around:
            return around  # a normalisation that holds its activation
        channels = given.shape[1] if given.ndim > 1 else 0
        beside = [one for one, width in self._norms if width == channels and one.rpartition(".")[0] == parent]
        return beside[-1] if beside else ""

    def before(self, layer: str, tensor: Tensor, version: int, position: int) -> Activation | None:
        """Return the activation whose input `@pre` means for a layer's output.

        Args:
            layer: its name.
            tensor: the output.
            version: how often it had been changed in place when the layer returned it.
            position: how many layers had finished by then.
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
    """Tells a listener of every called activation function, and of what is done with its result.

    Args:
        listener: an object with methods `called(given, in_place)` before an activation, `activated(made)` after it, and
            `moved(name, args, apply, made)` after an operation of :data:`MOVES`, which `apply` does to other arguments.
    """

    def __init__(self, listener: Any) -> None:
        super().__init__()
        self.listener = listener

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Tell the listener of an activation, and run the operation."""
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
    """Whether a module is a batch normalisation over maps, with scale and shift, frozen or not, of any library."""
    held = isinstance(getattr(module, "weight", None), Tensor) and isinstance(getattr(module, "bias", None), Tensor)
    return held and isinstance(getattr(module, "running_mean", None), Tensor)
