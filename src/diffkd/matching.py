"""Which layer of the student goes with which layer of the teacher."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

from torch import nn

from diffkd.dense_layers import box_outputs, class_map, common_levels
from diffkd.layers import Layer, list_layers
from diffkd.layout import Layout
from diffkd.methods import MethodFactory
from diffkd.ramp import ALWAYS, Ramp
from diffkd.shape import Want

DEFAULT_WANTS: frozenset[Want] = frozenset({"feature", "logits"})
DEFAULT_LEAST_CLASSES = 2
_SKIP = 8  # a layer of that many times fewer positions has left out a resolution: halving the sides makes 4, twice 16
_POOLS = ("AdaptiveAvgPool2d", "AdaptiveMaxPool2d")  # to a size that a head wants, be it larger than the map


@dataclass(frozen=True)
class Pair:
    """A layer of the student, the layer of the teacher it learns from, and the method between them.

    Args:
        student: dotted layer name, "output" for what the model returns, "fpn[0]" for an element of a layer's output; a
            list of names for methods that take several levels at once.
        teacher: the same for the teacher; None: the student's name(s).
        method: a method, or a factory `(student_shape, teacher_shape) -> method` such as a method's class. None: the
            distiller's default.
        weight: factor of all of the pair's losses.
        ramp: when in the training they count, on top of `weight`.
        name: prefix of the losses' names; None: the student's layer.
        student_layout: how to read the student's output, where it is not found out right.
        teacher_layout: the same for the teacher.

    Raises:
        ValueError: if `weight` is negative or not finite.
    """

    student: str | Sequence[str]
    teacher: str | Sequence[str] | None = None
    method: nn.Module | MethodFactory | None = None
    weight: float = 1.0
    ramp: Ramp = ALWAYS
    name: str | None = None
    student_layout: Layout | None = None
    teacher_layout: Layout | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(
                f"weight={self.weight} of pair '{self.name or self.student}' is no factor of a loss: give 0 or more"
            )

    @property
    def student_names(self) -> tuple[str, ...]:
        """The student's layers."""
        return (self.student,) if isinstance(self.student, str) else tuple(self.student)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The teacher's layers."""
        names = self.student if self.teacher is None else self.teacher
        return (names,) if isinstance(names, str) else tuple(names)


def match_layers(
    student: nn.Module,
    teacher: nn.Module,
    example: Any,
    *,
    teacher_example: Any = None,
    method: MethodFactory | None = None,
) -> list[Pair]:
    """Pair the layers of two models automatically.

    Depending on what the method wants: the last maps before pooling, the logits (where both have the same classes), or
    the last map of every resolution, deepest with deepest. Models without maps (plain MLPs) pair their last hidden
    vectors. Segmenters with the same classes pair their class maps before up-sampling, in the place of logits, and a
    method that wants those gets nothing else of them. Scores of fewer classes than the method can learn from are left
    out, with a warning. Detectors pair the levels of their feature pyramids
    (:func:`~diffkd.dense_layers.common_levels`).

    Args:
        student, teacher: any two modules.
        example: input of the student, as for :func:`~diffkd.list_layers`.
        teacher_example: input of the teacher; None: the student's.
        method: the method's factory, which says what it wants; None: the last feature and the logits.

    Returns:
        The pairs, `method` set in each.

    Raises:
        ValueError: if the models offer nothing that the method wants; the message says what to give instead.
    """
    student_layers = list_layers(student, example)
    teacher_layers = list_layers(teacher, example if teacher_example is None else teacher_example)
    return pair_layers(student_layers, teacher_layers, method)


def pair_layers(student: Sequence[Layer], teacher: Sequence[Layer], method: MethodFactory | None = None) -> list[Pair]:
    """Pair two lists of layers, as :func:`match_layers` does."""
    wants = wants_of(method)
    if "box outputs" in wants and (outputs := _box_output_pair(student, teacher, method)) is not None:
        return [outputs]
    if (levels := _pyramid_pairs(student, teacher, method, wants)) is not None:
        return levels
    pairs = []
    maps = class_map(student), class_map(teacher)
    classes, least = (_scored(student), _scored(teacher)), least_classes_of(method)
    same_classes = classes[0] is not None and classes[0] == classes[1] and (maps[0] is None) == (maps[1] is None)
    too_few = same_classes and (classes[0] or 0) < least
    if maps[0] and maps[1] and same_classes and not too_few and wants & {"logits", "class map"}:
        return [Pair(maps[0].name, maps[1].name, method)]
    if wants & {"stages", "levels"}:
        ours, theirs = stages(student), stages(teacher)
        few = min(len(ours), len(theirs))
        names = [(a.name, b.name) for a, b in zip(ours[-few:], theirs[-few:], strict=True)] if few else []
        if "levels" in wants and names:
            pairs.append(Pair([a for a, _ in names], [b for _, b in names], method, name="levels"))
        elif names:
            pairs.extend(Pair(a, b, method) for a, b in names)
    if wants & {"feature", "class map"}:
        ours_last, theirs_last = last_feature(student), last_feature(teacher)
        if ours_last and theirs_last:
            pairs.append(Pair(ours_last.name, theirs_last.name, method))
    if "logits" in wants and same_classes and not (too_few or maps[0]):
        pairs.append(Pair(student[-1].name, teacher[-1].name, method))
    name = attribute_of(method, "__name__", "this method")
    if not pairs:
        scored = f"{classes[0] or 'no'} and {classes[1] or 'no'} classes"
        detectors = len(common_levels(student, teacher)) > 0
        hint = "detectors score boxes, which BoxKD compares; or " if detectors else ""
        wanted = " and ".join(
            f"logits of {least} or more classes" if w == "logits" and too_few else w for w in sorted(wants)
        )
        raise ValueError(
            f"nothing to pair for {name}, which wants {wanted}: the outputs of student and "
            f"teacher have {scored}, their last features are {_name(last_feature(student))} and "
            f"{_name(last_feature(teacher))}; {hint}give pairs=[Pair(student_layer, teacher_layer)], `diffkd layers` "
            "lists the layers"
        )
    if too_few and wants & {"logits", "class map"}:
        warnings.warn(
            f"{name} is not paired with the models' scores, which are of {classes[0]} class: it learns from {least} or "
            "more, such as two where there is one logit now; only features are distilled",
            stacklevel=3,
        )
    return pairs


def _pyramid_pairs(
    student: Sequence[Layer], teacher: Sequence[Layer], method: MethodFactory | None, wants: frozenset[Want]
) -> list[Pair] | None:
    """Return the pairs of two feature pyramids' common levels; None if there are no two pyramids."""
    levels = common_levels(student, teacher)
    if not levels or not wants & {"feature", "stages", "levels", "class map"}:
        return None
    layout = Layout("nchw")
    if "levels" in wants:
        names = [ours for ours, _ in levels], [theirs for _, theirs in levels]
        return [Pair(*names, method, name="levels", student_layout=layout, teacher_layout=layout)]
    return [Pair(ours, theirs, method, student_layout=layout, teacher_layout=layout) for ours, theirs in levels]


def _box_output_pair(student: Sequence[Layer], teacher: Sequence[Layer], method: MethodFactory | None) -> Pair | None:
    ours, theirs = box_outputs(student), box_outputs(teacher)
    if ours is None or theirs is None:
        return None
    rows = Layout("rows")
    return Pair(list(ours), list(theirs), method, name="boxes", student_layout=rows, teacher_layout=rows)


def wants_of(factory: Any) -> frozenset[Want]:
    """Return what a method's factory wants of automatic pairing: its own `wants`, or that of the class it wraps."""
    wants: frozenset[Want] = attribute_of(factory, "wants", DEFAULT_WANTS)
    return wants


def least_classes_of(factory: Any) -> int:
    """Return the fewest classes of logits that a method's factory, or the class it wraps, says it can learn from."""
    return int(attribute_of(factory, "least_classes", DEFAULT_LEAST_CLASSES if factory is None else 1))


def attribute_of(factory: Any, name: str, default: Any) -> Any:
    """Return a class attribute of the method that a factory builds, through any partial calls around it."""
    while factory is not None:
        found = getattr(factory, name, None)
        if found is not None:
            return found
        factory = getattr(factory, "func", None)
    return default


def last_feature(layers: Sequence[Layer]) -> Layer | None:
    """Return the last map before pooling; for a model without maps, the last hidden vector."""
    scores = class_map(layers)
    if scores is not None and scores.feature_shape is not None:
        channels = scores.feature_shape.channels
        before = layers[: layers.index(scores)]
        maps = [layer for layer in before if layer.instead is None and layer.is_map and not _has(layer, channels)]
    else:
        classes = _classes(layers)
        # A layer that scores every position (an auxiliary head) comes after the last feature, and is none.
        linear = ("Linear", "Conv2d")
        maps = [
            layer for layer in _trunk(layers) if layer.is_map and not (layer.type in linear and _has(layer, classes))
        ]
    if maps:
        return maps[-1]
    output = layers[-1]
    vectors = [layer for layer in layers[:-1] if layer.instead is None and layer.layout and not layer.is_map]
    # The layer that makes the output, and whatever merely passes it on, is no hidden one.
    hidden = [layer for layer in vectors if layer.shape != output.shape]
    return hidden[-1] if hidden else None


def stages(layers: Sequence[Layer]) -> list[Layer]:
    """Return one map per resolution that the model passes through, from large to small, ending with the last feature.

    Taken from the outermost modules that show them ("layer2", "stages.1"), the last one at each. A module that returns
    a map much smaller than what came before it is looked into, at whatever depth, for those in between
    ("resnet.encoder.stages.1"); while fewer than three are found, so is the first module.
    """
    last = last_feature(layers)
    if last is None or not last.is_map:
        return []
    trunk = [layer for layer in _trunk(layers) if layer.is_map and _batch(layer) == _batch(last)]
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
    found = [by_area[area] for area in sorted(by_area, reverse=True)]
    order = {layer.name: position for position, layer in enumerate(layers)}
    # An attention map may look like a large feature map; but it comes late, after smaller ones.
    return [
        layer
        for position, layer in enumerate(found)
        if all(order[layer.name] < order[smaller.name] for smaller in found[position + 1 :])
    ]


def _enclosing(name: str) -> Iterator[str]:
    """Yield the names of the modules around a layer, the nearest first."""
    while name := name.rpartition(".")[0]:
        yield name


def _holds_between(maps: Sequence[Layer], layer: Layer, before: int) -> bool:
    """Whether inside of a layer there are maps smaller than what came before it, and larger than what it returns."""
    inside = (one for one in maps if one.name.startswith(f"{layer.name}."))
    return any(_area(layer) < _area(one) < before for one in inside)


def _trunk(layers: Sequence[Layer]) -> list[Layer]:
    """Return the intact layers that are not inside a head: a module that takes maps and returns none.

    A head may look at maps of its own (attention pooling does); those are not features of the model. But a module with
    more maps inside than there are outside is no head but the net, in a wrapper that may normalise or resize its images
    first: the search goes on inside the last of them.
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


def _area(layer: Layer) -> int:
    size = layer.feature_shape.size if layer.feature_shape else ()
    return math.prod(size)


def _batch(layer: Layer) -> int | None:
    return layer.layout.batch(layer.shape) if layer.layout else None


def _classes(layers: Sequence[Layer]) -> int | None:
    shape = layers[-1].feature_shape
    return shape.channels if shape is not None and not layers[-1].is_map else None


def _scored(layers: Sequence[Layer]) -> int | None:
    """How many classes a model scores, at each position or once; None if it scores none."""
    scores = class_map(layers)
    shape = None if scores is None else scores.feature_shape
    return _classes(layers) if shape is None else shape.channels


def _name(layer: Layer | None) -> str:
    return f"'{layer.name}'" if layer else "missing"
