"""Recording of the outputs of chosen layers by hooks."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffkd.features.activations import Activation, CalledActivations, before_activation, moved_from
from diffkd.features.forward import run
from diffkd.features.layout import select_tensor
from diffkd.features.trace import OUTPUT, version_of
from diffkd.files.weights import unwrap


class Call(NamedTuple):
    """The positional arguments and the output of a layer's call."""

    args: tuple[Any, ...]
    output: Any


class Recording(NamedTuple):
    """The result of one recorded forward.

    Attributes:
        output: the model's output; None if the forward was stopped early.
        features: the tensors of the chosen layers by name.
        calls: the calls of the watched layers by name.
    """

    output: Any
    features: dict[str, Tensor]
    calls: dict[str, Call]


@dataclass
class Recorder:
    """Records the outputs of chosen layers of one model by forward hooks, active only within :meth:`record`.

    Hooks are attached once, to the unwrapped model, so that `torch.compile` sees them; they refer to this object, and a
    deep copy of the model gets its own inactive recorder.

    Args:
        names: the layers: "layer4", "output" for the model's output, "fpn[0]", "backbone[out]" for one element of an
            output that is a sequence or mapping, or "layer4@pre" for the input of its activation.
        watched: layers whose calls (arguments and output) are recorded.
        activations: the activation of each layer that has one, by name, from the probe; required for names such as
            "layer4@pre".
    """

    names: Sequence[str]
    watched: Sequence[str] = ()
    activations: Mapping[str, Activation] = field(default_factory=dict)
    active: bool = False
    stops: bool = False
    stopped: bool = False
    outputs: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    module_calls: Counter[str] = field(default_factory=Counter)
    function_taps: list["_FunctionTap | _MovedTap"] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    def attach(self, model: nn.Module) -> None:
        """Register the hooks in `model`.

        Raises:
            ValueError: if there is no such layer, or the model is compiled already.
        """
        modules = dict(unwrap(model).named_modules())
        for name in (*self.names, *self.watched):
            path, key = split_selector(name)
            if path == OUTPUT:
                continue  # the model's output needs no hook
            layer, is_before = before_activation(path)
            activation = self.activations.get(layer) if is_before else None
            if is_before and activation is None:
                raise ValueError(f"layer '{layer}' of {type(unwrap(model)).__name__} has no activation to tap")
            path = path if activation is None else activation.module
            module = modules.get(path)
            if module is None:
                raise ValueError(f"layer '{path}' is not in {type(unwrap(model)).__name__}")
            if hasattr(model, "_orig_mod") or _is_compiled(path, modules):
                # Hooks are not guarded: a graph compiled before, even for another model of this class, would be reused.
                raise ValueError(
                    f"{type(unwrap(model)).__name__} is compiled already, as a whole or around its layer '{path}', and "
                    "ignores hooks there; give the model as it was, and compile the distiller"
                )
            if activation is not None and activation.is_function:
                tap = _MovedTap(self, name) if activation.moved else _FunctionTap(self, name, activation.call)
                self.function_taps.append(tap)
                self.handles.append(module.register_forward_pre_hook(_Entrance(tap)))
                self.handles.append(module.register_forward_hook(_Exit(tap)))
                continue
            if activation is not None:
                self.handles.append(module.register_forward_pre_hook(_InputTap(self, name, activation.call)))
                continue
            watches = name in self.watched
            self.handles.append(module.register_forward_hook(_Tap(self, name, None if watches else key, watches)))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.function_taps.clear()

    def record(self, model: nn.Module, inputs: Any, *, whole: bool = True) -> Recording:
        """Run `model` and return its output and the recorded features.

        Args:
            model: the model given to :meth:`attach`.
            inputs: its input.
            whole: False: the forward may stop after the last recorded layer. It does if the output is not recorded, and
                the model is neither wrapped nor being compiled.

        Raises:
            ValueError: if a layer returned nothing to record, or its output was overwritten in place afterwards.
        """
        wants_output = any(split_selector(name)[0] == OUTPUT for name in self.names)
        self.stops = not (whole or wants_output or unwrap(model) is not model)
        self.active, self.stopped = True, False
        self.module_calls.clear()
        for tap in self.function_taps:
            tap.reset()
        output = None
        try:
            with CalledActivations(self) if self.function_taps else nullcontext():
                output = run(model, inputs)
        except Exception:
            # Check the flag and not the type: a model may catch the exception and raise another one.
            if not self.stopped:
                raise
        finally:
            # Drop all references: activations would otherwise live until the next batch.
            outputs, self.outputs, calls, self.calls, self.active = self.outputs, {}, self.calls, {}, False
            versions, self.versions, ran, self.ran = self.versions, {}, self.ran, set()
        for name, version in versions.items():
            if version_of(outputs[name]) != version:
                raise ValueError(
                    f"the output of layer '{name}' of {type(unwrap(model)).__name__} is overwritten in place by a "
                    "later layer, so that another feature would be distilled; take that layer instead, or construct it "
                    "with inplace=False"
                )
        for name in self.names:
            path, key = split_selector(name)
            if path == OUTPUT and (tensor := select_tensor(output, key)) is not None:
                outputs[name] = tensor
        missing = [name for name in self.names if name not in outputs]
        missing += [name for name in self.watched if name not in calls]
        if missing:
            is_without = missing[0] in ran or split_selector(missing[0])[0] == OUTPUT
            why = "returned no tensor to record, or none under that key" if is_without else self._why_not_run()
            raise ValueError(f"layer '{missing[0]}' of {type(unwrap(model)).__name__} {why}")
        return Recording(output, outputs, calls)

    def _why_not_run(self) -> str:
        if not self.handles:
            return "is recorded no longer, since the distiller was released: build another"
        return (
            "did not run this time: if the model in training leaves out blocks at random (layer drop), or calls only "
            "what is inside of them (gradient checkpointing), switch that off or take a layer that always runs; if a "
            "part of it is compiled already, compile the distiller instead"
        )

    def called(self, given: Tensor, in_place: bool) -> None:
        """Handle the call of an activation function; called by :class:`CalledActivations`."""
        if self.active:
            for tap in self.function_taps:
                tap.called(given, in_place)

    def activated(self, made: Tensor) -> None:
        """Handle the output of an activation function; called likewise."""
        if self.active:
            for tap in self.function_taps:
                tap.activated(made)

    def moved(self, name: str, args: Any, apply: Callable[[Any], Tensor], made: Any) -> None:
        """Handle a concatenation or rearrangement of values; called likewise."""
        if self.active:
            for tap in self.function_taps:
                tap.moved(name, args, apply, made)

    def keep(self, name: str, tensor: Tensor, in_place: bool) -> None:
        """Record the value before an activation, as a copy if the activation is in place."""
        kept = tensor.clone() if in_place else tensor
        self.outputs[name] = kept
        self.versions[name] = version_of(kept)

    def stop_if_complete(self) -> None:
        """Stop the model's forward, if that is allowed and all layers have been recorded; called by the hooks."""
        if torch.compiler.is_compiling():
            return  # a compiled graph holds the whole model: a graph break would cost more than it saves
        if self.active and self.stops and len(self.outputs) + len(self.calls) == len(self.names) + len(self.watched):
            self.stopped = True
            raise _Enough


class _Hook:
    """A hook; a class rather than a closure so that copying and pickling a model works."""

    @property
    def __name__(self) -> str:
        # Only TorchScript reads it, to compile the hook together with the model.
        raise AttributeError(
            "torch.jit.script would compile the distiller's hooks as well, which cannot be: call distiller.release() "
            "first, which ends it, or script a new model that has loaded the student's state_dict(); torch.export "
            "needs neither"
        )


class _InputTap(_Hook):
    """Records the argument of one call of an activation module; for :meth:`register_forward_pre_hook`."""

    def __init__(self, recorder: Recorder, name: str, call: int) -> None:
        self.recorder, self.name, self.call = recorder, name, call

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.recorder.active:
            if self.recorder.module_calls[self.name] == self.call:
                self.recorder.keep(self.name, args[0], bool(getattr(module, "inplace", False)))
            self.recorder.module_calls[self.name] += 1
            self.recorder.stop_if_complete()


class _FunctionTap:
    """Counts the activation calls within one module's forward, and records the input of one of them."""

    def __init__(self, recorder: Recorder, name: str, call: int) -> None:
        self.recorder, self.name, self.call = recorder, name, call
        self.reset()

    def reset(self) -> None:
        self.inside, self.count = False, 0

    def left(self, output: Any) -> None:
        self.inside = False

    def activated(self, made: Tensor) -> None:
        pass

    def moved(self, name: str, args: Any, apply: Callable[[Any], Tensor], made: Any) -> None:
        pass

    def called(self, given: Tensor, in_place: bool) -> None:
        if self.inside:
            if self.count == self.call:
                self.recorder.keep(self.name, given, in_place)
            self.count += 1


class _MovedTap:
    """Applies a layer's concatenations and rearrangements to the values before its activations."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name
        self.reset()

    def reset(self) -> None:
        self.inside = False
        self.given: Tensor | None = None
        self.known: list[tuple[Tensor, Tensor]] = []  # the value after the activation, and before it

    def called(self, given: Tensor, in_place: bool) -> None:
        if self.inside:
            self.given = given.clone() if in_place else given

    def activated(self, made: Tensor) -> None:
        if self.inside and self.given is not None:
            self.known.append((made, self.given))
            self.given = None

    def moved(self, name: str, args: Any, apply: Callable[[Any], Tensor], made: Any) -> None:
        if self.inside and (changed := moved_from(name, args, self._find)) is not None:
            self.known.append((made, apply(changed)))

    def _find(self, tensor: Tensor) -> Tensor | None:
        for made, before in reversed(self.known):
            if made is tensor:
                return before
        return None

    def left(self, output: Any) -> None:
        if self.inside and isinstance(output, Tensor) and (before := self._find(output)) is not None:
            self.recorder.keep(self.name, before, False)
        self.reset()


class _Entrance(_Hook):
    """Forward pre-hook: notifies a tap that its module starts."""

    def __init__(self, tap: "_FunctionTap | _MovedTap") -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.tap.inside = self.tap.recorder.active


class _Exit(_Hook):
    """Forward hook: notifies a tap that its module has finished."""

    def __init__(self, tap: "_FunctionTap | _MovedTap") -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.tap.left(output)
        self.tap.recorder.stop_if_complete()


class _Tap(_Hook):
    """Records what a layer returns, or its whole call."""

    def __init__(self, recorder: Recorder, name: str, key: str | None, watches: bool) -> None:
        self.recorder, self.name, self.key, self.watches = recorder, name, key, watches

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.recorder.active:
            self.recorder.ran.add(self.name)
        if self.recorder.active and self.watches:
            self.recorder.calls[self.name] = Call(args, output)
        elif self.recorder.active:
            tensor = select_tensor(output, self.key)
            if tensor is not None:
                self.recorder.outputs[self.name] = tensor
                self.recorder.versions[self.name] = version_of(tensor)
        self.recorder.stop_if_complete()


class _Enough(Exception):  # noqa: N818  # not an error: stops a forward after the last recorded layer
    """Raised inside a model's forward to stop it, and caught around it."""


def _is_compiled(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer, or a module around it, is compiled or scripted; wrappers around such modules are not."""
    parts = path.split(".")
    around = [modules[".".join(parts[:count])] for count in range(len(parts) + 1)]
    return "_orig_mod" in parts or any(one._compiled_call_impl is not None for one in around)


def split_selector(name: str) -> tuple[str, str | None]:
    """Split "fpn[0]" into the layer's name and the key, ("fpn", "0"); the key is None if there is none.

    "layer3@pre" has no key: :func:`~diffkd.features.activations.before_activation` splits that.
    """
    match = re.fullmatch(r"(.+)\[([^\[\]]+)\]", name)
    return (match[1], match[2]) if match else (name, None)
