"""Finding of the class scores in a model's output, and of the layer that makes them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from diffkd.features.layout import Layout, resize, select_tensor
from diffkd.features.trace import OUTPUT, Seen, elements_of, is_same


def returns_features(
    output: Any, class_map: Seen | None, layouts: Mapping[str, Layout | None], seen: Sequence[Seen]
) -> bool:
    """Whether a map that a model returns is a feature of it, as a backbone's is, and no scores of positions.

    Tokens are, and so is the first of several maps of different channels or under names other than "logits" or "out".
    Scores come out of a matrix of weights, and nothing of their channels and size has been normalised or activated.

    Args:
        output: what the model returned.
        class_map: the layer whose output it up-samples to that.
        layouts: of the layers' outputs and of "output", by name.
        seen: what its layers returned.
    """
    result, layout = select_tensor(output), layouts[OUTPUT]
    if result is None or layout is None or math.prod(layout.size(result.shape)) == 1:
        return False
    names = set(output) if isinstance(output, Mapping) else set()
    if names & {"logits", "out"} or hasattr(output, "logits"):
        return False
    channels = {tensor.shape[1] for tensor in elements_of(OUTPUT, output).values() if tensor.ndim == 4}
    if layout.kind in ("tokens", "sequence") or len(names) > 1 or len(channels) > 1:
        return True
    maker = next((one for one in seen if one.intact and is_same(one.tensor, result)), None)
    if class_map is not None or (maker is not None and maker.may_score):
        return False
    return any(one.keeps_shape and _read(one.tensor, layouts[one.name]) == _read(result, layout) for one in seen)


def class_scores(output: Any, class_map: Seen | None, seen: Sequence[Seen]) -> str:
    """Return the name of the class scores in what a model returns: "output", or "output[1]" of (feature, scores).

    They are an element other than the one usually meant only if that one comes straight out of no matrix of weights,
    and is no class map, while the element is a vector that does.
    """
    result, elements = select_tensor(output), elements_of(OUTPUT, output)
    named = isinstance(output, Mapping) and {"logits", "out"} & set(output)
    if result is None or not elements or named or hasattr(output, "logits") or class_map is not None:
        return OUTPUT
    makers = [one.tensor for one in seen if one.may_score]
    if any(is_same(tensor, result) for tensor in makers):
        return OUTPUT
    vectors = {name: tensor for name, tensor in elements.items() if tensor.ndim == 2}
    made = (name for name, tensor in vectors.items() if any(is_same(one, tensor) for one in makers))
    return next(made, OUTPUT)


def _read(tensor: Tensor, layout: Layout | None) -> tuple[int, tuple[int, ...]] | None:
    return None if layout is None else (layout.channels(tensor.shape), layout.size(tensor.shape))


def before_upsampling(seen: Sequence[Seen], result: Tensor) -> Seen | None:
    """Return the layer whose class map the model up-samples to what it returns; None if there is none.

    It is the one that looks most like the result when it is up-sampled; an auxiliary head's map does not.
    """
    if result.ndim != 4:
        return None
    area = math.prod(result.shape[2:])
    best, found = 0.8, None
    for one in seen:
        tensor = one.tensor
        if tensor.ndim != 4 or tensor.shape[:2] != result.shape[:2] or not one.intact:
            continue
        if not 1 < math.prod(tensor.shape[2:]) < area:  # a single position is what has been pooled
            continue
        likeness = F.cosine_similarity(
            resize(tensor.float(), (result.shape[2], result.shape[3])).flatten(), result.float().flatten(), dim=0
        )
        if float(likeness) > best:
            best, found = float(likeness), one
    return found


def count_queries(result: Sequence[int], elements: Sequence[Sequence[int]]) -> int | None:
    """Return how many queries a model answers, each with scores, and a box (B, N, 4) or a mask (B, N, H, W).

    They are a set, and no grid of positions, whatever their number.

    Args:
        result: shape of the scores that the model returns, (B, N, K) if it answers queries.
        elements: shapes of all that it returns.

    Returns:
        N, or None if the model answers no queries.
    """
    if len(result) != 3 or result[2] == 4:
        return None
    start = tuple(result[:2])
    answered = any(tuple(shape[:2]) == start and (tuple(shape[2:]) == (4,) or len(shape) == 4) for shape in elements)
    return result[1] if answered else None
