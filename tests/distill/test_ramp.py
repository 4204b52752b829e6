import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffkd import Ramp


@given(st.floats(0, 50), st.floats(0, 50), st.floats(0.1, 50), st.floats(0, 200))
def test_factor_stays_in_bounds_and_is_zero_outside(start: float, warmup: float, length: float, epoch: float) -> None:
    ramp = Ramp(start=start, warmup=warmup, stop=start + length)
    factor = ramp(epoch)
    assert 0.0 <= factor <= 1.0
    if epoch < start or epoch >= start + length:
        assert factor == 0.0


def test_warmup_rises_linearly() -> None:
    assert [Ramp(warmup=20)(epoch) for epoch in (0, 5, 10, 20, 240)] == [0.0, 0.25, 0.5, 1.0, 1.0]


def test_default_counts_always() -> None:
    assert Ramp().is_constant
    assert Ramp()(0) == Ramp()(1e6) == 1.0


@pytest.mark.parametrize(
    "values",
    [
        {"start": -1},
        {"warmup": -0.1},
        {"start": 3, "stop": 3},
        {"start": math.nan},
        {"warmup": math.nan},
        {"stop": math.nan},
    ],
)
def test_nonsense_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="ramp needs"):
        Ramp(**values)


def test_by_epoch_counts_the_epoch_under_way():
    """mdistiller: min(epoch / warmup, 1) with epochs from 1."""
    ramp = Ramp(warmup=4, by_epoch=True)
    assert [ramp(epoch) for epoch in (0, 0.9, 1.0, 2.5, 3.0, 50)] == [0.25, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert Ramp(warmup=1, by_epoch=True).is_constant
    assert Ramp(start=2, warmup=2, by_epoch=True)(2.5) == 0.5
