"""The layers of a model, listed by running it once."""

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.calling import evaluation_mode, input_size_of, on_device_of, run, shapes_of
from diffkd.layout import Layout, fitting_layouts, infer_layout, resize, select_tensor
from diffkd.locality import change_corner, most_local
from diffkd.prefix_tokens import prefix_tokens
from diffkd.queries import count_queries
from diffkd.shape import FeatureShape, Role
from diffkd.weights import unwrap

OUTPUT = "output"
"""The name that stands for what the whole model returns."""

_OF_MAPS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)  # (B, C, H, W) and nothing else


@dataclass(frozen=True)
class Layer:
    """One layer of a model as the probe saw it.

    Attributes:
        name: dotted name, or "output" for the output of the whole model.
        type: name of its class.
        shape: shape of its output for the example, batch first.
        layout: how the output is read, None if its shape is not understood.
        calls: how often it ran in one forward.
        instead: None if the output can be distilled; otherwise the layer to take instead, "" if none was found. Outputs
            that are overwritten in place after the layer has run, or that come several times, cannot be.
        elements: names ("fpn[0]") and shapes of the tensors in an output that is a sequence or mapping of several.
        scores: whether the output holds the scores that the model returns: "output", or, of a segmenter, the layer that
            makes it and the class map that is up-sampled to it.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    layout: Layout | None
    calls: int = 1
    instead: str | None = None
    elements: tuple[tuple[str, tuple[int, ...]], ...] = ()
    scores: bool = False

    @property
    def feature_shape(self) -> FeatureShape | None:
        """Channels and size of the output, None if its layout is unknown."""
        if self.layout is None:
            return None
        role: Role = "logits" if self.scores else "feature"
        return FeatureShape(self.layout.channels(self.shape), self.layout.size(self.shape), role)

    @property
    def is_map(self) -> bool:
        """Whether the output has more than one position."""
        shape = self.feature_shape
        return shape is not None and shape.is_map and shape.size != (1, 1)


def list_layers(model: nn.Module, example: Any) -> list[Layer]:
    """Run `model` once and list every layer that returns a tensor, in the order in which they finish.

    The model is left as it was: it runs in evaluation mode without gradients, and its modes are put back.

    Args:
        model: any module.
        example: its input: a tensor (B, C, H, W), a tuple of arguments, or a mapping of keyword arguments; moved to the
            model's device.

    Returns:
        The layers; the last is named "output" and stands for what the whole model returns.

    Raises:
        ValueError: if the model cannot take the example, or returns no tensor.
    """
    model = unwrap(model)
    example = on_device_of(model, example)
    output, seen = _watch(model, example)
    result = select_tensor(output)
    if result is None:
        raise ValueError(
            f"{type(model).__name__} returns no tensor but {type(output).__name__}; wrap it so that it does"
        )
    calls: dict[str, int] = {}
    for one in seen:
        calls[one.name] = calls.get(one.name, 0) + 1
    class_map = _before_upsampling(seen, result)
    outputs = {one.name: one.tensor for one in seen} | {OUTPUT: result}
    layouts = _layouts(model, example, outputs, {one.grid for one in seen if one.grid is not None})
    elements = _elements(OUTPUT, output)
    queries = count_queries(result.shape, [shape for _, shape in elements])
    for one in seen:
        if queries is not None and one.tensor.ndim == 3 and one.tensor.shape[1] == queries:
            layouts[one.name] = Layout("rows")
    if queries is not None:
        layouts[OUTPUT] = None  # two models' queries do not go together one by one
    layers = []
    for position, one in enumerate(seen):
        if any(later.name == one.name for later in seen[position + 1 :]):
            continue  # listed once, where it ran last
        intact = one.tensor._version == one.version
        layers.append(
            Layer(
                one.name,
                one.type,
                tuple(one.tensor.shape),
                layouts[one.name],
                calls[one.name],
                None if intact and calls[one.name] == 1 else _instead(seen, position, calls),
                one.elements,
                one is class_map or (result.ndim == 4 and _is(one.tensor, result)),
            )
        )
    # A detector returns boxes for each image: nothing that could be compared with another model's.
    detects = isinstance(output, (list, tuple)) and all(isinstance(one, Mapping) for one in output)
    layout = None if detects else layouts[OUTPUT]
    last = Layer(OUTPUT, type(model).__name__, tuple(result.shape), layout, elements=elements, scores=True)
    return [*layers, replace(last, elements=()) if detects else last]


def find_layer(layers: Sequence[Layer], name: str, owner: str) -> Layer:
    """Return the layer called `name`, if it can be distilled.

    Args:
        layers: as from :func:`list_layers`.
        name: dotted name, without selector.
        owner: whose layers these are, for the message: "student ResNet".

    Raises:
        ValueError: if there is no such layer (the message names the nearest), or its output cannot be distilled.
    """
    by_name = {layer.name: layer for layer in layers}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.4) or list(by_name)[-2:]
        nearest = ", ".join(f"'{other}' ({describe(by_name[other])})" for other in near)
        raise ValueError(f"layer '{name}' is not in {owner}; nearest: {nearest}. `diffkd layers` lists all.")
    layer = by_name[name]
    if layer.instead is not None:
        why = "runs several times in one forward" if layer.calls > 1 else "has its output overwritten in place"
        mend = f"take '{layer.instead}' instead" if layer.instead else "take a layer around it"
        raise ValueError(f"layer '{name}' of {owner} {why}, so it cannot be distilled; {mend}")
    return layer


def describe(layer: Layer) -> str:
    """Return the shape of a layer's output for people: "512x7x7", or the raw shape if it is not understood."""
    return str(layer.feature_shape or layer.shape)


@dataclass
class _Seen:
    name: str
    type: str
    tensor: Tensor
    version: int
    elements: tuple[tuple[str, tuple[int, ...]], ...]
    grid: tuple[int, int] | None  # of positions, where the layer's type leaves no doubt of them


def _watch(model: nn.Module, example: Any) -> tuple[Any, list[_Seen]]:
    """Run the model once; return its output, and what each layer returned, as often as it ran."""
    seen: list[_Seen] = []
    handles = [
        module.register_forward_hook(_probe_hook(name, seen))
        for name, module in model.named_modules()
        if name not in ("", OUTPUT) and not isinstance(module, torch.jit.ScriptModule)  # which take no hooks
    ]
    try:
        # What is compiled runs as it is written: a graph from before knows nothing of these hooks.
        with evaluation_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return run(model, example), seen
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ValueError(
            f"{type(model).__name__} cannot take an example of shape {shapes_of(example)} "
            f"({type(error).__name__}: {reason}); give the example as the model is called in training"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _layouts(
    model: nn.Module, example: Any, outputs: Mapping[str, Tensor], grids: Collection[tuple[int, int]]
) -> dict[str, Layout | None]:
    """Find out the layout of each output; where its shape allows several, by running the model once more."""
    input_size, prefixes = input_size_of(example), prefix_tokens(model)
    shapes = {name: tensor.shape for name, tensor in outputs.items()}
    fits = {name: fitting_layouts(shape, input_size, prefixes, grids) for name, shape in shapes.items()}
    layouts = {name: infer_layout(shape, input_size, prefixes, grids) for name, shape in shapes.items()}
    unsure = {name for name in fits if len(fits[name]) > 1}
    if unsure:
        again, seen = _watch(model, change_corner(example))
        changed = {one.name: one.tensor for one in seen} | {OUTPUT: select_tensor(again)}
        for name in unsure:
            after = changed.get(name)
            layouts[name] = (None if after is None else most_local(fits[name], outputs[name], after)) or layouts[name]
    return layouts


def _probe_hook(name: str, seen: list[_Seen]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensor = select_tensor(output)
        if tensor is not None:
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.inplace:
                tensor.mul_(1)  # it overwrites its input in training, and does nothing in evaluation
            grid = (tensor.shape[2], tensor.shape[3]) if isinstance(module, _OF_MAPS) and tensor.ndim == 4 else None
            seen.append(_Seen(name, type(module).__name__, tensor, tensor._version, _elements(name, output), grid))

    return hook


def _elements(name: str, output: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    named: Sequence[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        named = list(output.items())
    elif isinstance(output, (list, tuple)):
        named = list(enumerate(output))
    # An element may hold a tensor among other things, as (map, mask) does, and stands for that then.
    tensors = ((key, select_tensor(value)) for key, value in named)
    found = tuple((f"{name}[{key}]", tuple(tensor.shape)) for key, tensor in tensors if tensor is not None)
    return found if len(found) > 1 else ()


def _is(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.data_ptr() == other.data_ptr()


def _before_upsampling(seen: Sequence[_Seen], result: Tensor) -> "_Seen | None":
    """Return the layer whose class map the model up-samples to what it returns; None if there is none.

    It is the one that looks most like the result when it is up-sampled; an auxiliary head's map does not.
    """
    if result.ndim != 4:
        return None
    area = math.prod(result.shape[2:])
    best, found = 0.8, None
    for one in seen:
        tensor = one.tensor
        if tensor.ndim != 4 or tensor.shape[:2] != result.shape[:2] or math.prod(tensor.shape[2:]) >= area:
            continue
        if one.tensor._version != one.version:
            continue
        likeness = F.cosine_similarity(
            resize(tensor.float(), (result.shape[2], result.shape[3])).flatten(), result.float().flatten(), dim=0
        )
        if float(likeness) > best:
            best, found = float(likeness), one
    return found


def _instead(seen: Sequence[_Seen], position: int, calls: Mapping[str, int]) -> str:
    """Name the nearest layer that holds the same tensor, or else encloses it, and is intact."""
    lost = seen[position]

    def sound(one: _Seen) -> bool:
        return one.tensor._version == one.version and calls[one.name] == 1

    later = seen[position + 1 :]
    same = (one for one in later if sound(one) and one.tensor.data_ptr() == lost.tensor.data_ptr())
    around = (one for one in later if sound(one) and lost.name.startswith(f"{one.name}."))
    return next((one.name for found in (same, around) for one in found), "")
