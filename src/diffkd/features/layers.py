"""The layers of a model, listed by running it once."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffkd.features.activations import Activation, before_activation
from diffkd.features.ambiguous_layouts import change_corner, most_local, prefix_tokens
from diffkd.features.class_scores import before_upsampling, class_scores, count_queries, returns_features
from diffkd.features.forward import batch_of, input_size_of, on_device_of
from diffkd.features.layout import Layout, fitting_layouts, infer_layout, select_tensor
from diffkd.features.shape import FeatureShape, Role
from diffkd.features.trace import OUTPUT, Seen, by_name, elements_of, is_same, run_watched
from diffkd.files.weights import unwrap


@dataclass(frozen=True)
class Layer:
    """One layer of a model in the probed forward.

    Attributes:
        name: dotted name, or "output" for the output of the whole model; "output[1]" if its scores are that element.
        type: name of its class.
        shape: shape of its output for the example, batch first.
        layout: layout of the output, None if its shape is not understood or it holds no real numbers.
        calls: number of calls in one forward.
        instead: None if the output can be distilled; otherwise the layer to take instead, "" if none was found. Outputs
            that are overwritten in place after the layer has run, or that occur several times, cannot be.
        elements: names ("fpn[0]") and shapes of the tensors in an output that is a sequence or mapping of several.
        scores: whether the output holds the scores that the model returns: "output", or, in a segmenter, the layer that
            computes it and the class map that is up-sampled to it. A backbone, which returns features, has none.
        element_layouts: layout of each of the elements.
        before: the activation whose input "NAME@pre" names; None if that cannot be recorded.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    layout: Layout | None
    calls: int = 1
    instead: str | None = None
    elements: tuple[tuple[str, tuple[int, ...]], ...] = ()
    scores: bool = False
    element_layouts: tuple[Layout | None, ...] = ()
    before: Activation | None = None

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

    The model runs in evaluation mode without gradients; its modes are restored.

    Args:
        model: any module.
        example: its input: a tensor (B, C, H, W), a tuple of arguments, or a mapping of keyword arguments; moved to the
            model's device.

    Returns:
        The layers; the last is the model's output, named "output", or "output[1]" if the class scores are only an
        element of it.

    Raises:
        ValueError: if the model cannot take the example, or returns no tensor.
    """
    model = unwrap(model)
    example = on_device_of(model, example)
    output, seen = run_watched(model, example)
    result = select_tensor(output)
    if result is None:
        raise ValueError(
            f"{type(model).__name__} returns no tensor but {type(output).__name__}; wrap it so that it does"
        )
    calls: dict[str, int] = {}
    for one in seen:
        calls[one.name] = calls.get(one.name, 0) + 1
    class_map = before_upsampling(seen, result)
    scores = class_scores(output, class_map, seen)
    layouts = _layouts(model, example, by_name(output, seen), {one.grid for one in seen if one.grid is not None})
    elements = elements_of(OUTPUT, output)
    result = elements.get(scores, result)
    queries = count_queries(result.shape, [tensor.shape for tensor in elements.values()])
    for one in seen:
        if queries is not None and one.tensor.ndim == 3 and one.tensor.shape[1] == queries:
            layouts[one.name] = Layout("rows")
    if queries is not None:
        layouts[OUTPUT] = None  # the queries of two models do not correspond one to one
    features = scores == OUTPUT and returns_features(output, class_map, layouts, seen)
    layers = []
    for position, one in enumerate(seen):
        if any(later.name == one.name for later in seen[position + 1 :]):
            continue  # listed once, at its last call
        layers.append(
            Layer(
                one.name,
                one.type,
                tuple(one.tensor.shape),
                layouts[one.name],
                calls[one.name],
                None if one.intact and calls[one.name] == 1 else _instead(seen, position, calls),
                tuple((name, tuple(tensor.shape)) for name, tensor in one.elements.items()),
                not features and (one is class_map or (result.ndim == 4 and is_same(one.tensor, result))),
                tuple(layouts[name] for name in one.elements),
                one.before if calls[one.name] == 1 else None,
            )
        )
    # A detector returns boxes for each image, which cannot be compared with those of another model.
    detects = isinstance(output, (list, tuple)) and all(isinstance(one, Mapping) for one in output)
    layout = None if detects else layouts[scores]
    if detects:
        elements = {}
    last = Layer(
        scores,
        type(model).__name__,
        tuple(result.shape),
        layout,
        elements=tuple((name, tuple(tensor.shape)) for name, tensor in elements.items()),
        scores=not features,
        element_layouts=tuple(layouts[name] for name in elements),
    )
    return [*layers, last]


def find_layer(layers: Sequence[Layer], name: str, owner: str) -> Layer:
    """Return the layer called `name`, if it can be distilled.

    Args:
        layers: as from :func:`list_layers`.
        name: dotted name, without selector, or followed by "@pre".
        owner: the model, for messages: "student ResNet".

    Raises:
        ValueError: if there is no such layer (the message names the nearest), or its output cannot be distilled.
    """
    by_name = {layer.name.partition("[")[0] if layer is layers[-1] else layer.name: layer for layer in layers}
    name, before = before_activation(name)
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.4) or list(by_name)[-2:]
        nearest = ", ".join(f"'{other}' ({describe(by_name[other])})" for other in near)
        raise ValueError(f"layer '{name}' is not in {owner}; nearest: {nearest}. `diffkd layers` lists all.")
    layer = by_name[name]
    if before:
        if layer.before is None:
            raise ValueError(
                f"layer '{name}' of {owner} has no activation right before or after its output, so '{name}@pre' means "
                f"nothing; take '{layer.instead or name}'"
            )
        return layer
    if layer.instead is not None:
        why = "runs several times in one forward" if layer.calls > 1 else "has its output overwritten in place"
        mend = f"take '{layer.instead}' instead" if layer.instead else "take a layer around it"
        raise ValueError(f"layer '{name}' of {owner} {why}, so it cannot be distilled; {mend}")
    return layer


def activations_of(layers: Sequence[Layer]) -> dict[str, Activation]:
    """Return the activation of each layer that has one, by the layer's name."""
    return {layer.name: layer.before for layer in layers if layer.before is not None}


def describe(layer: Layer) -> str:
    """Return the shape of a layer's output as text: "512x7x7", or the raw shape if it is not understood."""
    return str(layer.feature_shape or layer.shape)


def _layouts(
    model: nn.Module, example: Any, outputs: Mapping[str, Tensor], grids: Collection[tuple[int, int]]
) -> dict[str, Layout | None]:
    """Infer the layout of each output; if its shape allows several, by running the model once more."""
    input_size, batch, prefixes = input_size_of(example), batch_of(example), prefix_tokens(model)
    unread: dict[str, Layout | None] = {name: None for name, one in outputs.items() if not one.is_floating_point()}
    shapes = {name: tensor.shape for name, tensor in outputs.items() if name not in unread}
    fits = {name: fitting_layouts(shape, input_size, prefixes, grids, batch) for name, shape in shapes.items()}
    layouts = {name: infer_layout(shape, input_size, prefixes, grids, batch) for name, shape in shapes.items()}
    unsure = {name for name in fits if len(fits[name]) > 1}
    if unsure:
        again, seen = run_watched(model, change_corner(example))
        changed = by_name(again, seen)
        for name in unsure:
            after = changed.get(name)
            layouts[name] = (None if after is None else most_local(fits[name], outputs[name], after)) or layouts[name]
    return layouts | unread


def _instead(seen: Sequence[Seen], position: int, calls: Mapping[str, int]) -> str:
    """Return the name of the nearest intact layer with the same tensor, or else around it."""
    lost = seen[position]

    def sound(one: Seen) -> bool:
        return one.intact and calls[one.name] == 1

    later = seen[position + 1 :]
    same = (one for one in later if sound(one) and one.tensor.data_ptr() == lost.tensor.data_ptr())
    around = (one for one in later if sound(one) and lost.name.startswith(f"{one.name}."))
    return next((one.name for found in (same, around) for one in found), "")
