"""Factors of a method that are none, found out when the distiller builds it."""

import math
from functools import partial

import pytest
import torch
from small_distillers import distil
from torch import nn

from diffkd import DIST, DKD, KD, DiffKD, FitNet, Pair, Shared


class Own(nn.Module):
    """A method of somebody's, whose factor is its own affair."""

    def __init__(self, student: object, teacher: object) -> None:
        super().__init__()
        self.weight = -1.0

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"kd": self.weight * (student - teacher).mean()}


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        (DiffKD, "kd_weight"),
        (DiffKD, "reconstruction_weight"),
        (partial(Shared, method=DiffKD), "diffusion_weight"),
        (FitNet, "weight"),
        (KD, "temperature"),
        (DKD, "alpha"),
        (DIST, "gamma"),
    ],
)
def test_a_factor_that_is_none_is_named(method: partial[nn.Module], name: str, value: float) -> None:
    inner = {"method": partial(DiffKD, **{name: value})} if isinstance(method, partial) else {name: value}
    with pytest.raises(ValueError, match=f"{name}={value} is no factor|{name} must be above 0"):
        distil(method=partial(method, **inner))


def test_zero_and_the_factors_of_other_peoples_methods_are_taken() -> None:
    distil(method=partial(DiffKD, kd_weight=0, temperature=0.5))
    distil(pairs=[Pair("output", method=Own)])
