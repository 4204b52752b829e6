"""Random integers computed from a step counter (a counter-based random number generator).

Methods with a memory draw from it at every step. The state of a `torch.Generator` is in no checkpoint; the counter is a
buffer, so that a resumed run draws the same numbers as an uninterrupted one. No value is copied to the host.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def random_integers(step: Tensor, shape: Sequence[int], high: int | Tensor, stream: int = 0) -> Tensor:
    """Return whole numbers in 0..high-1, uniform to within high / 2^32.

    Args:
        step: scalar int64, the counter.
        shape: shape of the result.
        high: exclusive bound below 2^31, broadcast against `shape`.
        stream: index of the independent random sequence, for example the rank.

    Returns:
        int64 of `shape`, on the device of `step`; the same for the same arguments, on all devices.
    """
    key = _mix(_mix(step) + stream)
    positions = torch.arange(prod(shape), device=step.device)
    bits = _mix(_mix(positions + key) + _mix(key + 0x9E3779B9))
    return (bits.reshape(tuple(shape)) * high) >> 32


def _mix(x: Tensor) -> Tensor:
    """Scramble 32 bits: xor-shift and multiply. The factors are below 2^31, so that no product overflows int64."""
    x = x & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
