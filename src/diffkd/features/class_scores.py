"""Detection of the class scores in a model's output, and of the layer that computes them."""

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
    """Whether a map that a model returns is a feature, as a backbone's is, rather than scores per position.

    Tokens are features, and so is the first of several maps with different channels or with names other than "logits"
    or "out". Scores come from a weight matrix, and no value of their channels and size was normalised or activated.

    Args:
        output: the model's output.
        class_map: the layer whose output the model up-samples to its output.
        layouts: of the layers' outputs and of "output", by name.
        seen: the traced outputs of its layers.
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

    Another element than the default one (:func:`~diffkd.features.layout.select_tensor`) is chosen only if the default
    is neither the output of a weight matrix nor a class map, while the element is a vector from a weight matrix.
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
    """Return the layer whose class map the model up-samples to its output; None if there is none.

    It is the one most similar to the result after up-sampling, which excludes an auxiliary head's map.
    """
    if result.ndim != 4:
        return None
    area = math.prod(result.shape[2:])
    best, found = 0.8, None
    for one in seen:
        tensor = one.tensor
        if tensor.ndim != 4 or tensor.shape[:2] != result.shape[:2] or not one.intact:
            continue
        if not 1 < math.prod(tensor.shape[2:]) < area:  # a single position has been pooled
            continue
        likeness = F.cosine_similarity(
            resize(tensor.float(), (result.shape[2], result.shape[3])).flatten(), result.float().flatten(), dim=0
        )
        if float(likeness) > best:
            best, found = float(likeness), one
    return found


def count_queries(result: Sequence[int], elements: Sequence[Sequence[int]]) -> int | None:
    """Return the number of queries of a model that returns scores and a box (B, N, 4) or mask (B, N, H, W) for each.

    Queries are a set, not a grid of positions.

    Args:
        result: shape of the scores that the model returns, (B, N, K) if it has queries.
        elements: shapes of all tensors that it returns.

    Returns:
        N, or None if the model has no queries.
    """
    if len(result) != 3 or result[2] == 4:
        return None
    start = tuple(result[:2])
    answered = any(tuple(shape[:2]) == start and (tuple(shape[2:]) == (4,) or len(shape) == 4) for shape in elements)
    return result[1] if answered else None
