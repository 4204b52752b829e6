"""The layers of models for dense prediction: a detector's feature pyramid, a segmenter's class map."""

import math
from collections.abc import Sequence

from diffkd.layers import Layer


def pyramid(layers: Sequence[Layer]) -> dict[str, str]:
    """Return the levels of a detector's feature pyramid, their names by key, from large to small.

    It is the last output of several maps that have ever fewer positions, if possible with equal channels, such as what
    torchvision's `backbone` returns: {"0": "backbone[0]", "1": "backbone[1]", ...}. A model that returns one tensor, as
    classifiers and segmenters do, has none.
    """
    if layers[-1].layout is not None and not layers[-1].elements:
        return {}
    found = [layer for layer in reversed(layers[:-1]) if layer.instead is None and _falls(layer)]
    # Without a pyramid of its own a detector has the maps of its backbone, whose channels differ.
    alike = [layer for layer in found if len({shape[1] for _, shape in layer.elements}) == 1]
    for layer in alike or found:
        return {name.rpartition("[")[2].rstrip("]"): name for name, _ in layer.elements}
    return {}


def _falls(layer: Layer) -> bool:
    shapes = [shape for _, shape in layer.elements]
    if len(shapes) < 2 or any(len(shape) != 4 for shape in shapes):
        return False
    areas = [math.prod(shape[2:]) for shape in shapes]
    return areas == sorted(areas, reverse=True) and areas[0] > areas[-1]  # the last two may be 1x1 both


def common_levels(student: Sequence[Layer], teacher: Sequence[Layer]) -> list[tuple[str, str]]:
    """Return the pairs of levels that two feature pyramids have in common, from large to small; [] if there are none.

    Levels of the same key go together, unless keys mean other sizes in each: the level "0" is a quarter of the image in
    a Faster R-CNN and an eighth in a RetinaNet. Then those of the same size do.
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
    """Return the layer that gives a segmenter's class scores by position, before they are up-sampled.

    None for models that do not score positions.
    """
    if layers[-1].layout is None or not layers[-1].is_map or not layers[-1].scores:
        return None
    scores = [layer for layer in layers if layer.scores and layer.is_map and layer.instead is None]
    return min(scores, key=_area)  # of equals the first, which is the convolution itself


def _area(layer: Layer) -> int:
    return math.prod(layer.feature_shape.size) if layer.feature_shape else 0
