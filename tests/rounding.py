"""How far rounding may take a result, whatever kernels the processor has.

Two computations of one formula in float32 differ, for their kernels order sums differently, and which kernel runs is
decided by the processor, the number of threads and the release of the library. By how much they differ is decided by
the formula: a batch normalisation of nearly equal values magnifies the rounding of its input a hundredfold, and a ReLU
passes a gradient or stops it where its input is zero but for rounding. A tolerance that was read off one machine
therefore says nothing about another. Tests compare in one of two ways:

- Where float32 is not what the test is about, both sides compute in float64. `EXACT` is then the tolerance: nine
  million units of rounding, which no order of summation uses up, and far less than any mistake makes.
- Where it is, the result is held against a reference in float64, and the bound comes from that reference: `bounds`
  repeats it with every operation's result made wrong at random. This is the standard model of floating-point
  arithmetic, fl(a op b) = (a op b)(1 + d) with |d| <= u; of a sum of n terms in any order, each term is wrong by at
  most (n - 1)u, and by some sqrt(n) u if the roundings are independent (Higham, Accuracy and Stability of Numerical
  Algorithms, chapter 4). Random relative errors of that size give the spread of the result: Monte Carlo arithmetic
  (Parker, 1997). No float32 kernel has a part in the bound, and what the formula magnifies is magnified in it as well.
  The errors drawn are larger than those of float32, so that some draws switch each ReLU that float32 may switch.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def units_of(dtype: torch.dtype, count: int = 16) -> float:
    """Return `count` units of rounding: 16 are those of sums of some hundreds of terms."""
    return count * torch.finfo(dtype).eps / 2


MOVES = {"_to_copy", "cat", "clone", "constant_pad_nd", "embedding", "full_like", "index", "neg", "new_zeros"}
MOVES |= {"ones_like", "relu", "scalar_tensor", "stack", "threshold_backward", "where", "zeros_like"}


class Rounded(TorchDispatchMode):
    """In it, the results of all float64 operations, those of a backward as well, are wrong by up to `error` of each."""

    def __init__(self, error: float, seed: int) -> None:
        super().__init__()
        self.error = error
        self.generator = torch.Generator().manual_seed(seed)
        self.factors = torch.empty(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_exact(func):
            return result
        return tuple(map(self.rounded, result)) if isinstance(result, tuple) else self.rounded(result)

    def rounded(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            return x
        count = x.numel()
        if count > len(self.factors):  # drawn for many operations at once
            wrong = torch.rand(max(count, 1 << 16), dtype=torch.float64, generator=self.generator)
            self.factors = 1 + self.error * (2 * wrong - 1)
        factors, self.factors = self.factors[:count], self.factors[count:]
        return x * factors.view(x.shape)


@cache
def is_exact(func: Any) -> bool:
    """Whether an operation makes, copies or chooses numbers and rounds none, or returns a view, or works in place."""
    aliases = any(returned.alias_info is not None for returned in func._schema.returns)
    return aliases or func._schema.name.removeprefix("aten::") in MOVES


def bounds(
    compute: Callable[[], Mapping[str, Tensor]], error: float, draws: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return what `compute` returns, which is in float64, and how far rounding may move any entry of each tensor.

    Twice the farthest of the draws: what a switched ReLU does and what the other roundings do adds up. An entry that is
    zero but for rounding has the rounding of what cancels in it too: taken as large as all that `compute` returns.
    """
    exact = {name: value.detach() for name, value in compute().items()}
    moved = dict.fromkeys(exact, 0.0)
    for seed in range(draws):
        with Rounded(error, seed):
            found = compute()
        for name, value in found.items():
            far = furthest(value, exact[name])
            assert math.isfinite(far), f"{name} is {value} after rounding"
            moved[name] = max(moved[name], far)
    scale = max(float(value.abs().max()) for value in exact.values())
    return exact, {name: 2 * far + error * scale for name, far in moved.items()}


def furthest(x: Tensor, y: Tensor) -> float:
    """Return the largest difference of any two entries."""
    return float((x.detach().double().reshape(y.shape) - y.detach().double()).abs().max())


def assert_rounded(
    actual: Mapping[str, Tensor], compute: Callable[[], Mapping[str, Tensor]], error: float, draws: int = 8
) -> None:
    """Assert that `actual` is what `compute` returns in float64, but for rounding."""
    exact, moved = bounds(compute, error, draws)
    assert actual.keys() == exact.keys()
    beyond = {
        name: f"{difference:.2e}, where rounding explains {moved[name]:.2e}"
        for name, value in exact.items()
        if not (difference := furthest(actual[name], value)) <= moved[name]
    }
    assert not beyond, beyond
