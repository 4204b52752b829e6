"""Pairs of student and teacher layers, and automatic pairing."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import nn

from diffkd.distill.balance import Balance
from diffkd.distill.ramp import ALWAYS, Ramp
from diffkd.distill.stages import (
    box_outputs,
    class_map,
    common_levels,
    embedding,
    last_block,
    last_feature,
    stages,
    vector_classes,
)
from diffkd.features.activations import PRE
from diffkd.features.layers import Layer, list_layers
from diffkd.features.layout import Layout
from diffkd.features.reader import Reader, SideName
from diffkd.features.shape import Want
from diffkd.methods import MethodFactory

DEFAULT_WANTS: frozenset[Want] = frozenset({"feature", "logits", "embedding"})
DEFAULT_LEAST_CLASSES = 2


@dataclass(frozen=True)
class Pair:
    """A layer of the student, the layer of the teacher it learns from, and the method between them.

    Args:
        student: dotted layer name, "output" for the model's output, "fpn[0]" for an element of a layer's output,
            "layer3@pre" for the input of the activation at the end of a layer (if the layer does not end in one: of the
            next activation, with at most a normalisation between); a list of names for methods that take several levels
            at once.
        teacher: the same for the teacher; None: the student's name(s).
        method: a method, or a factory `(student_shape, teacher_shape) -> method` such as a method's class. None: the
            distiller's default.
        weight: factor of all of the pair's losses, or a :class:`~diffkd.Balance` that determines it.
        ramp: further factor of the losses that depends on the epoch.
        name: prefix of the losses' names; None: the student's layer.
        student_layout: layout of the student's output, if it is not inferred correctly.
        teacher_layout: the same for the teacher.
        source: of several teachers the one it learns from, counted from 0.

    Raises:
        ValueError: if `weight` is negative or not finite, or `source` is negative.
    """

    student: str | Sequence[str]
    teacher: str | Sequence[str] | None = None
    method: nn.Module | MethodFactory | None = None
    weight: float | Balance = 1.0
    ramp: Ramp = ALWAYS
    name: str | None = None
    student_layout: Layout | None = None
    teacher_layout: Layout | None = None
    source: int = 0

    def __post_init__(self) -> None:
        if self.source < 0:
            raise ValueError(f"source={self.source} of pair '{self.name or self.student}' is no teacher: count from 0")
        if not isinstance(self.weight, Balance) and not 0 <= self.weight < math.inf:
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

    The method's `wants` selects: the last maps before pooling, the logits (if the number of classes is equal), the
    stages (:func:`~diffkd.distill.stages.stages`), aligned at the deepest, or the last or the second stage.
    Models without maps (plain MLPs) pair their last hidden vectors. Segmenters with the same classes pair their class
    maps before up-sampling in place of logits; a method that wants class maps gets only those. Scores of fewer classes
    than the method requires are left out, with a warning. Detectors pair the levels of their feature pyramids
    (:func:`~diffkd.distill.stages.common_levels`).

    Args:
        student, teacher: any two modules.
        example: input of the student, as for :func:`~diffkd.list_layers`.
        teacher_example: input of the teacher; None: the student's.
        method: the method's factory, which has `wants`; None: the last feature and the logits.

    Returns:
        The pairs, `method` set in each.

    Raises:
        ValueError: if the models have no layers that the method wants; the message says what to give instead.
    """
    student_layers = list_layers(student, example)
    teacher_layers = list_layers(teacher, example if teacher_example is None else teacher_example)
    return pair_layers(student_layers, teacher_layers, method)


def pair_representations(
    student: Sequence[Layer], teacher: Sequence[Layer], method: MethodFactory | None = None
) -> list[Pair]:
    """Pair the layers of two models whose outputs are representations, not class scores.

    Maps are paired as :func:`match_layers` does: the last maps or patch tokens, the stages, the levels. Methods that
    want "embedding" also get the pooled outputs (:func:`~diffkd.distill.stages.embedding`); where one model returns
    none, the mean over the positions of its last map. A method that relates the images of a batch gets these alone.

    Raises:
        ValueError: if the method learns from class scores alone, or there is nothing to pair.
    """
    wants = wants_of(method)
    name = attribute_of(method, "__name__", "this method")
    of_maps = wants - {"logits", "stages to logits", "feature to logits", "box outputs", "embedding"}
    if not of_maps:
        raise ValueError(
            f"{name} learns from class scores, and representations have none: take DiffKD, FitNet, Cosine, CWD, RKD, "
            "SP or PKT, or data with labels"
        )
    ours, theirs = embedding(student), embedding(teacher)
    last = last_feature(student), last_feature(teacher)
    sides = [
        vector or (layer.name if layer is not None else None)
        for vector, layer in zip((ours, theirs), last, strict=True)
    ]
    pooled = []
    if (ours or theirs) and sides[0] is not None and sides[1] is not None:
        pooled = [Pair(sides[0], sides[1], method, name="embedding")]
    if pooled and int(attribute_of(method, "least_batch", 1)) > 1:
        return pooled
    are_maps = all(layer is not None and layer.is_map for layer in last)
    pairs = pair_layers(student, teacher, method, of_maps) if are_maps or not pooled else []
    return [*pairs, *(pooled if "embedding" in wants else [])] or pooled


def pair_layers(
    student: Sequence[Layer],
    teacher: Sequence[Layer],
    method: MethodFactory | None = None,
    wants: frozenset[Want] | None = None,
) -> list[Pair]:
    """Pair two lists of layers, as :func:`match_layers` does; `wants` replaces the method's own."""
    wants = wants_of(method) - {"embedding"} if wants is None else wants
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
        names = _named(ours[-few:], theirs[-few:], method) if few else []
        if "pooled" in wants and names and not maps[0] and not maps[1]:
            last = last_feature(student), last_feature(teacher)
            names += [(a.name, b.name) for a, b in [last] if a is not None and b is not None]
        if "levels" in wants and names:
            pairs.append(Pair([a for a, _ in names], [b for _, b in names], method, name="levels"))
        elif names:
            pairs.extend(Pair(a, b, method) for a, b in names)
    if wants & {"last stage", "second stage"}:
        ours, theirs = stages(student), stages(teacher)
        common = list(zip(ours[::-1], theirs[::-1], strict=False))[::-1]
        if common:
            a, b = common[-1 if "last stage" in wants else min(1, len(common) - 1)]
            pairs.extend(Pair(*names, method) for names in _named([a], [b], method))
        else:
            wants = wants | {"feature"}
    if wants & {"feature", "last block", "class map"}:
        ours_last = last_feature(student)
        theirs_last = last_block(teacher) if "last block" in wants else last_feature(teacher)
        if ours_last and theirs_last:
            pairs.append(Pair(ours_last.name, theirs_last.name, method))
    if "logits" in wants and same_classes and not (too_few or maps[0]):
        pairs.append(Pair(student[-1].name, teacher[-1].name, method))
    if wants & {"stages to logits", "feature to logits"} and same_classes and not (too_few or maps[0]):
        feature = last_feature(student)
        before = stages(student) if "stages to logits" in wants else [feature] if feature is not None else []
        if before:
            ours_names = [*(layer.name for layer in before), student[-1].name]
            pairs.append(Pair(ours_names, [teacher[-1].name], method, name="logits"))
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


def _named(student: Sequence[Layer], teacher: Sequence[Layer], method: MethodFactory | None) -> list[tuple[str, str]]:
    """Return the names of paired layers, with "@pre" on the sides in the method's `before_activation`."""
    sides: frozenset[SideName] = attribute_of(method, "before_activation", frozenset())

    def name(layer: Layer, side: SideName) -> str:
        return f"{layer.name}{PRE}" if side in sides and layer.before is not None else layer.name

    return [(name(a, "student"), name(b, "teacher")) for a, b in zip(student, teacher, strict=True)]


def _pyramid_pairs(
    student: Sequence[Layer], teacher: Sequence[Layer], method: MethodFactory | None, wants: frozenset[Want]
) -> list[Pair] | None:
    """Return the pairs of two feature pyramids' common levels; None if a model has no pyramid."""
    levels = common_levels(student, teacher)
    if not levels or not wants & {
        "feature",
        "last block",
        "stages",
        "levels",
        "class map",
        "last stage",
        "second stage",
    }:
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
    """Return `wants` of a method's factory, or of the class it wraps."""
    wants: frozenset[Want] = attribute_of(factory, "wants", DEFAULT_WANTS)
    options = getattr(factory, "keywords", {})
    if options.get("features_only"):
        wants = wants - {"logits", "class map"}
    if options.get("last_stage") and "feature" in wants:
        wants = wants - {"feature"} | {"last block"}
    return wants


def least_classes_of(factory: Any) -> int:
    """Return `least_classes` of a method's factory, or of the class it wraps."""
    return int(attribute_of(factory, "least_classes", DEFAULT_LEAST_CLASSES if factory is None else 1))


def attribute_of(factory: Any, name: str, default: Any) -> Any:
    """Return a class attribute of the method that a factory builds, through any partial calls around it."""
    while factory is not None:
        found = getattr(factory, name, None)
        if found is not None:
            return found
        factory = getattr(factory, "func", None)
    return default


def _scored(layers: Sequence[Layer]) -> int | None:
    """The number of classes that a model scores, per position or per image; None if it has no scores."""
    scores = class_map(layers)
    shape = None if scores is None else scores.feature_shape
    return vector_classes(layers) if shape is None else shape.channels


def _name(layer: Layer | None) -> str:
    return f"'{layer.name}'" if layer else "missing"


HEADER = ("pair", "student layer", "shape", "teacher layer", "shape", "method", "parameters")


def unique_names(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return a name for each pair: its own, or that of its student's layers; duplicates get a number."""
    wanted = [pair.name or ",".join(pair.student_names) for pair in pairs]
    names: list[str] = []
    for name in wanted:
        numbered = (name if number == 1 else f"{name}#{number}" for number in count(1))
        names.append(next(one for one in numbered if one not in names))
    return tuple(names)


def pair_rows(
    names: Sequence[str], readers: Sequence[tuple[Reader, Reader]], methods: Sequence[nn.Module]
) -> Iterator[tuple[str, ...]]:
    """Yield one row per pair, with the columns of :data:`HEADER`."""
    for name, (ours, theirs), method in zip(names, readers, methods, strict=True):
        parameters = f"{sum(p.numel() for p in method.parameters()):,}"
        yield (
            name,
            ", ".join(ours.names),
            str(ours),
            ", ".join(theirs.names),
            str(theirs),
            type(method).__name__,
            parameters,
        )


def as_text(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    """Return `title` and the rows below their header, in columns of even width."""
    table = [HEADER, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, *lines])
