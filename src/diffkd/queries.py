"""Queries: what models that answer with a set of boxes or masks, as DETR does, have in the place of positions."""

from collections.abc import Sequence


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
