"""Seeds derived from several numbers, such as epoch and index; a digest of sample lists; a stratified split."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

_MASK = (1 << 64) - 1


def mix_seed(*numbers: int) -> int:
    """Mix integers into one 63-bit seed with the splitmix64 finaliser (Steele et al., OOPSLA 2014).

    Order and count of the numbers are significant: `mix_seed(1, 2)`, `mix_seed(2, 1)` and `mix_seed(1, 2, 0)` differ.
    The result is the same on every machine and in every process, unlike `hash`.

    Args:
        numbers: any integers, such as (seed, epoch, batch, rank); taken modulo 2^64.

    Returns:
        An integer in [0, 2^63), fit for `torch.Generator.manual_seed` and `random.Random`.

    >>> mix_seed(0, 1) == mix_seed(0, 1), mix_seed(0, 1) == mix_seed(1, 0)
    (True, False)
    """
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def digest_of(*parts: Tensor | Iterable[object]) -> str:
    """Return a digest of tensors and of the `str` of other values, in order.

    >>> digest_of(["a", 1]) == digest_of(["a", "1"]) != digest_of([1, "a"])
    True
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        else:
            digest.update("\0".join(map(str, part)).encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def split_by_class(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw samples to hold out for evaluation, the same share of each class.

    Args:
        labels: the class of each sample.
        share: share of each class to hold out: at least one sample, but never all of them.
        seed: seed of the draw, which is a function of labels, share and seed.

    Returns:
        The indices kept and the indices held out, each sorted.

    Raises:
        ValueError: if the share is out of range, or no class has two samples.

    >>> split_by_class([0, 0, 0, 0, 1, 1, 1, 2], share=0.3, seed=0)[1]
    [3, 5]
    """
    if not 0 < share < 1:
        raise ValueError(f"val_share={share} is no share: give above 0 and below 1, such as 0.1.")
    order = np.random.default_rng(mix_seed(seed, 0)).permutation(len(labels)).tolist()
    by_class: dict[int, list[int]] = {}
    for index in order:
        by_class.setdefault(labels[index], []).append(index)
    held = sorted(
        index
        for members in by_class.values()
        for index in members[: min(max(1, round(share * len(members))), len(members) - 1)]
    )
    if not held:
        raise ValueError(f"val_share={share}: no class has two training images, of which one could be held back.")
    taken = set(held)
    return [index for index in range(len(labels)) if index not in taken], held
