"""Selection of feature layers: last feature, one stage per resolution, pyramid levels, class map, box outputs."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import count, pairwise
from typing import Any

from torch import Tensor

from diffkd.features.layers import Layer
from diffkd.features.layout import Layout, select_tensor
from diffkd.features.recorder import split_selector


def pyramid(layers: Sequence[Layer]) -> dict[str, str]:
    """Return the levels of a detector's feature pyramid, their names by key, from large to small.

    It is the last output with several maps of decreasing size, preferably with equal channels, such as the output of
    torchvision's `backbone`: {"0": "backbone[0]", "1": "backbone[1]", ...}. A model that returns one tensor, such as a
    classifier or segmenter, has none.
    """
    if layers[-1].layout is not None and not layers[-1].elements:
        return {}
    found = [layer for layer in reversed(layers[:-1]) if layer.instead is None and _falls(layer)]
    # A detector without a pyramid has the maps of its backbone, whose channels differ.
    alike = [layer for layer in found if len({shape[1] for _, shape in layer.elements}) == 1]
    for layer in alike or found:
        return {name.rpartition("[")[2].rstrip("]"): name for name, _ in layer.elements}
    return {}


def _falls(layer: Layer) -> bool:
    shapes = [shape for _, shape in layer.elements]
    if len(shapes) < 2 or any(len(shape) != 4 for shape in shapes):
        return False
    areas = [math.prod(shape[2:]) for shape in shapes]
    return areas == sorted(areas, reverse=True) and areas[0] > areas[-1]  # the last two may both be 1x1


def common_levels(student: Sequence[Layer], teacher: Sequence[Layer]) -> list[tuple[str, str]]:
    """Return the pairs of levels that two feature pyramids have in common, from large to small; [] if there are none.

    Levels are paired by key, or by size if the sizes of a key differ: level "0" has stride 4 in a Faster R-CNN and
    stride 8 in a RetinaNet.
    """
    ours, theirs = pyramid(student), pyramid(teacher)
    sizes = [{name: shape[2:] for layer in layers for name, shape in layer.elements} for layers in (student, teacher)]
    same_key = [(ours[key], theirs[key]) for key in ours if key in theirs]
    if same_key and all(sizes[0][a] == sizes[1][b] for a, b in same_key):
        return same_key
    same_size: list[tuple[str, str]] = []
    left = list(theirs.values())
    for a in ours.values():
        if b := next((b for b in left if sizes[1][b] == sizes[0][a]), None):
            same_size.append((a, b))
            left.remove(b)
    return same_size or same_key


def box_outputs(layers: Sequence[Layer]) -> tuple[str, str] | None:
    """Return the names of a detector's class scores and box regression, before any selection of boxes.

    Those of one-stage detectors are the elements "cls_logits" (B, N, K) and "bbox_regression" (B, N, 4) of an output;
    those of two-stage ones two outputs (R, K + 1) and (R, 4 (K + 1)) for the same proposals.
    """
    for layer in layers:
        shapes = dict(layer.elements)
        named = f"{layer.name}[cls_logits]", f"{layer.name}[bbox_regression]"
        if all(name in shapes for name in named):
            return named
        if len(shapes) == 2 and layer.layout is not None:
            (scores, classes), (deltas, numbers) = shapes.items()
            if len(classes) == len(numbers) == 2 and classes[0] == numbers[0] and numbers[1] == 4 * classes[1]:
                return scores, deltas
    return None


def class_map(layers: Sequence[Layer]) -> Layer | None:
    """Return the layer with a segmenter's class scores per position, before up-sampling; None for other models."""
    if layers[-1].layout is None or not layers[-1].is_map or not layers[-1].scores:
        return None
    scores = [layer for layer in layers if layer.scores and layer.is_map and layer.instead is None]
    return min(scores, key=_positions)  # of equal sizes the first, which is the convolution itself


def _positions(layer: Layer) -> int:
    return math.prod(layer.feature_shape.size) if layer.feature_shape else 0


_SKIP = 8  # a layer with fewer positions by this factor skips a resolution: stride 2 gives 4, stride 4 gives 16
_HALVED = 4  # positions of a map that a stride of 2 makes one of
_POOLS = ("AdaptiveAvgPool2d", "AdaptiveMaxPool2d")  # to a fixed size for the head, possibly larger than the map


def last_feature(layers: Sequence[Layer]) -> Layer | None:
    """Return the last map before pooling; for a model without maps, the last hidden vector.

    On images so small that the last stage has one position, it is that stage's map of 1x1.
    """
    scores = class_map(layers)
    if scores is not None and scores.feature_shape is not None:
        channels = scores.feature_shape.channels
        before = layers[: layers.index(scores)]
        maps = [layer for layer in before if layer.instead is None and layer.is_map and not _has(layer, channels)]
    else:
        classes = vector_classes(layers)
        # A layer with scores per position (an auxiliary head) comes after the last feature.
        linear = ("Linear", "Conv2d")
        trunk = [layer for layer in _trunk(layers) if not (layer.type in linear and _has(layer, classes))]
        maps = [layer for layer in trunk if layer.is_map]
        if maps and _area(maps[-1]) <= _HALVED:
            maps += _of_one_position(layers, trunk, maps[-1])
    if maps:
        return maps[-1]
    output = layers[-1]
    vectors = [layer for layer in layers[:-1] if layer.instead is None and layer.layout and not layer.is_map]
    # The layer that computes the output, and layers that only pass it on, are not hidden layers.
    hidden = [layer for layer in vectors if layer.shape != output.shape]
    return hidden[-1] if hidden else None


def last_block(layers: Sequence[Layer]) -> Layer | None:
    """Return the last feature, or the last stage's map where a head's convolution makes a wider one of it."""
    last = last_feature(layers)
    found = [] if class_map(layers) is not None else stages(layers)
    if not found or last is None or last.feature_shape is None or found[-1].feature_shape is None:
        return last
    ours, widened = found[-1].feature_shape, last.feature_shape
    return found[-1] if ours.size == widened.size and ours.channels < widened.channels else last


def _of_one_position(layers: Sequence[Layer], trunk: Sequence[Layer], last: Layer) -> list[Layer]:
    """Return the 1x1 maps after the last larger map and before any pooling: the last stage's, on small images.

    If the last larger map is of a module that holds all maps before, that is the whole body, and a head follows.
    """
    position = {layer.name: index for index, layer in enumerate(layers)}
    earlier = (layer.name for layer in layers[: position[last.name]] if layer.is_map)
    if all(name.startswith(f"{last.name}.") for name in earlier):
        return []
    after = [layer for layer in trunk if position[layer.name] > position[last.name]]
    found = [layer for layer in after if _has_size(layer, (1, 1))]
    inside = tuple(f"{layer.name}." for layer in found)
    pools = (
        index
        for index, layer in enumerate(layers)
        if index > position[last.name]
        and "Pool" in layer.type
        and "MaxPool" not in layer.type
        and not layer.name.startswith(inside)
    )
    end = next(pools, len(layers))
    return [layer for layer in found if position[layer.name] < end]


def embedding(layers: Sequence[Layer]) -> str | None:
    """Return the name of the pooled vector that a model without classifier returns, None if it returns maps alone.

    Of a mapping, as transformers return, it is `pooler_output` where there is one, or else the first vector.
    """
    output = layers[-1]
    if output.layout is not None and output.feature_shape is not None and not output.feature_shape.is_map:
        return output.name
    vectors = [name for name, shape in output.elements if len(shape) == 2]
    return next((name for name in vectors if name.endswith("[pooler_output]")), vectors[0] if vectors else None)


def read_embedding(layers: Sequence[Layer], output: Any) -> Tensor:
    """Return a model's embedding (B, C): its pooled output, or the mean over the positions of the map it returns.

    Args:
        layers: the model's, as from :func:`~diffkd.list_layers`.
        output: what it returned.

    Raises:
        ValueError: if it returned neither.
    """
    name = embedding(layers) or layers[-1].name
    tensor = select_tensor(output, split_selector(name)[1])
    layout = layers[-1].layout
    if name != layers[-1].name and tensor is not None:
        layout = Layout("vector")
    if tensor is None or layout is None:
        raise ValueError(
            f"{layers[-1].type} returns {layers[-1].shape}, which is neither a vector nor a map for each image: let it "
            "return one of them"
        )
    return layout.read(tensor).flatten(2).mean(dim=2) if layout.read(tensor).ndim == 4 else layout.read(tensor)


def stages(layers: Sequence[Layer]) -> list[Layer]:
    """Return the last map of each resolution, from large to small.

    The maps are outputs of the outermost modules that return them ("layer2", "stages.1"); in a classifier those of
    modules with several convolutions or linear layers, if there are any, since a head's convolution, a normalisation
    after the last block, or a stem is no stage. Otherwise the list ends with the last feature. If a module returns a
    map much smaller than the one before, the modules inside it are searched, at any depth, for the resolutions between
    ("resnet.encoder.stages.1"); while fewer than three stages are found, so is the first module.
    """
    last = last_feature(layers)
    if last is None or last.feature_shape is None or not last.feature_shape.is_map:
        return []
    single = _has_size(last, (1, 1))
    before = {layer.name for layer in layers[: layers.index(last) + 1]}
    trunk = [
        layer
        for layer in _trunk(layers)
        if _batch(layer) == _batch(last)
        and (layer.is_map or (single and layer.name in before and _has_size(layer, (1, 1))))
    ]
    maps = [layer for layer in trunk if _area(layer) >= _area(last)]
    names = {layer.name for layer in trunk}
    around = {name: next((one for one in _enclosing(name) if one in names), "") for name in names}
    opened = {""}
    for depth in count():
        shown = [layer for layer in maps if around[layer.name] in opened]
        by_area = {_area(layer): layer for layer in shown} | {_area(last): last}
        skipping = {
            layer.name
            for before, layer in pairwise(shown)
            if _area(before) > _SKIP * _area(layer) and _holds_between(maps, layer, _area(before))
        }
        outer = {_area(layer) for layer in shown if layer.name.count(".") <= depth}
        first = {layer.name for layer in shown[:1]} if len(outer | {_area(last)}) < 3 else set()
        if not (new := (skipping | first) & set(around.values()) - opened):
            break
        opened |= new
    if class_map(layers) is None:
        by_area = _blocks_first(layers, shown, opened, by_area)
    found = [by_area[area] for area in sorted(by_area, reverse=True)]
    order = {layer.name: position for position, layer in enumerate(layers)}
    # An attention map may look like a large feature map, but comes after smaller maps.
    return [
        layer
        for position, layer in enumerate(found)
        if all(order[layer.name] < order[smaller.name] for smaller in found[position + 1 :])
    ]


def _blocks_first(
    layers: Sequence[Layer], shown: Sequence[Layer], opened: Collection[str], by_area: dict[int, Layer]
) -> dict[int, Layer]:
    """Return the levels by area: blocks of several convolutions if there are any, and nothing before the first.

    A module that was searched returns the output of its last part, possibly a head's convolution: it is the level of
    its resolution only if no block inside is. Networks without blocks, such as VGG, keep every level.
    """
    names = {layer.name for layer in layers}
    inner = {around for name in names for around in _enclosing(name)}
    weighted = [one.name for one in layers if one.name not in inner and ("Conv" in one.type or "Linear" in one.type)]
    count = Counter(around for name in weighted for around in _enclosing(name))
    blocks = {
        _area(layer): layer
        for looked_into in (True, False)
        for layer in shown
        if count[layer.name] > 1 and (layer.name in opened) == looked_into
    }
    if all(layer.name in opened for layer in blocks.values()):
        return by_area
    largest = max(blocks)
    return {area: blocks.get(area, layer) for area, layer in by_area.items() if area <= largest}


def _enclosing(name: str) -> Iterator[str]:
    """Yield the names of the modules around a layer, the nearest first."""
    while name := name.rpartition(".")[0]:
        yield name


def _holds_between(maps: Sequence[Layer], layer: Layer, before: int) -> bool:
    """Whether a layer contains maps smaller than the map before it and larger than its output."""
    inside = (one for one in maps if one.name.startswith(f"{layer.name}."))
    return any(_area(layer) < _area(one) < before for one in inside)


def _trunk(layers: Sequence[Layer]) -> list[Layer]:
    """Return the intact layers that are not inside a head (a module that takes maps and returns none).

    Maps inside a head (attention pooling has some) are not features of the model. But a module with more maps inside
    than outside is the network itself in a wrapper that normalises or resizes images: the search continues inside the
    last of these.
    """
    root = ""
    while True:
        inside = [layer for layer in layers[:-1] if layer.name.startswith(root)]
        heads = [f"{layer.name}." for layer in inside if layer.layout is not None and not layer.is_map]
        trunk = [
            layer
            for layer in inside
            if layer.instead is None
            and layer.type not in _POOLS
            and not any(layer.name.startswith(head) for head in heads)
        ]
        maps = [layer.name for layer in inside if layer.instead is None and layer.is_map]
        outside = sum(layer.is_map for layer in trunk)
        nets = [head for head in heads if sum(name.startswith(head) for name in maps) > outside]
        outermost = [net for net in nets if not any(net != other and net.startswith(other) for other in nets)]
        if not outermost:
            return trunk
        root = outermost[-1]


def _has(layer: Layer, channels: int | None) -> bool:
    return layer.feature_shape is not None and layer.feature_shape.channels == channels


def _has_size(layer: Layer, size: tuple[int, int]) -> bool:
    return layer.feature_shape is not None and layer.feature_shape.size == size


def _area(layer: Layer) -> int:
    size = layer.feature_shape.size if layer.feature_shape else ()
    return math.prod(size)


def _batch(layer: Layer) -> int | None:
    return layer.layout.batch(layer.shape) if layer.layout else None


def vector_classes(layers: Sequence[Layer]) -> int | None:
    """Return the number of classes of a model that returns one score vector per image, None for other models."""
    shape = layers[-1].feature_shape
    return shape.channels if shape is not None and not layers[-1].is_map else None
