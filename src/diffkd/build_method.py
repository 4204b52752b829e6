"""The method of a pair, made for its two features."""

import math
from collections.abc import Callable, Iterator

from torch import nn

from diffkd.methods import MethodFactory
from diffkd.reader import Reader


def build_method(method: nn.Module | MethodFactory, student: Reader, teacher: Reader) -> nn.Module:
    """Return the method, or what its factory makes for the features that two readers give it.

    Raises:
        ValueError: if it is one of this package's and a factor of its losses is negative or not finite.
    """
    if isinstance(method, nn.Module):
        built = method
    else:
        factory: Callable[..., nn.Module] = method
        built = factory(*((side.shapes if student.several else side.shapes[0]) for side in (student, teacher)))
    for part in built.modules():
        if type(part).__module__.startswith("diffkd.methods."):
            for name, value in _factors(part):
                if not 0 <= value < math.inf:  # which NaN is not
                    raise ValueError(
                        f"{type(part).__name__}: {name}={value} is no factor: give a finite one, 0 or more"
                    )
    return built


def _factors(method: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield the numbers that a method multiplies losses or scores with, and their names."""
    for name, value in vars(method).items():
        if name == "weights":
            yield from ((f"{term}_weight", weight) for term, weight in value.items())
        elif isinstance(value, (int, float)) and name.endswith(("weight", "alpha", "beta", "gamma", "temperature")):
            yield name, value
