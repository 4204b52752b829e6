"""Whether the student's features carry a gradient: a pair whose feature carries none teaches the student nothing."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffkd.matching import Pair


class GradientWarning(UserWarning):
    """A feature carries no gradient to the student, so that the student learns nothing from it."""


class GradientFlow:
    """Looks at the student's features in training, and warns of each pair once.

    Args:
        names: of the pairs.
        pairs: of layers.
    """

    def __init__(self, names: Sequence[str], pairs: Sequence[Pair]) -> None:
        self.layers = {name: pair.student_names for name, pair in zip(names, pairs, strict=True)}
        self.missing: dict[str, tuple[str, ...]] = {}
        self._warned: set[str] = set()

    def look(self, features: Mapping[str, Tensor]) -> None:
        """Take in the student's features by layer, as they came out of a forward with gradients switched on."""
        found = {
            name: tuple(layer for layer in layers if not features[layer].requires_grad)
            for name, layers in self.layers.items()
        }
        self.missing = {name: layers for name, layers in found.items() if layers}
        if torch.compiler.is_compiling():
            return  # a graph cannot warn; :meth:`check` still tells
        for name, layers in self.missing.items():
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(_explain(name, layers), GradientWarning, stacklevel=4)

    def check(self) -> None:
        """Raise ValueError if a pair had no gradient at all, not even from one of several layers."""
        for name, layers in self.missing.items():
            if layers == self.layers[name]:
                raise ValueError(_explain(name, layers))


def _explain(pair: str, layers: Sequence[str]) -> str:
    which = ", ".join(f"'{layer}'" for layer in layers)
    return (
        f"pair '{pair}': the output of the student's {which} carries no gradient, so the student learns nothing from "
        "it. Either all parameters up to there are frozen, or they run under torch.no_grad or in "
        "torch.utils.checkpoint with use_reentrant=True; unfreeze them, checkpoint with use_reentrant=False, or pair a "
        "later layer"
    )
