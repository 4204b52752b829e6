import pytest
import torch

from diffkd.methods.counter_random import random_integers


def test_all_values_are_as_frequent():
    for high in (7, 100):
        drawn = random_integers(torch.tensor(3), (200_000,), high)
        counts = drawn.bincount(minlength=high).double()
        expected = 200_000 / high
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert len(counts) == high
        assert chi_squared == pytest.approx(high - 1, abs=6 * (2 * (high - 1)) ** 0.5)


def test_neighbouring_steps_streams_and_positions_are_unrelated():
    high = 2**31 - 1
    rows = [random_integers(torch.tensor(step), (50_000,), high, stream) for step in range(3) for stream in range(3)]
    rows.append(rows[0].roll(1))
    correlations = torch.corrcoef(torch.stack(rows).double())
    assert (correlations - torch.eye(len(rows))).abs().max() < 0.025


def test_the_same_step_draws_the_same():
    step = torch.tensor(123_456_789)
    first = random_integers(step, (3, 4), 1000)
    assert torch.equal(first, random_integers(step.clone(), (3, 4), 1000))
    assert torch.equal(first.flatten(), random_integers(step, (12,), 1000))
    assert first.flatten().tolist() == GOLDEN


def test_bounds_are_broadcast_and_kept():
    high = torch.tensor([[1], [2], [2**31 - 1]])
    drawn = random_integers(torch.tensor(0), (3, 10_000), high)
    assert drawn.dtype == torch.int64
    assert (drawn >= 0).all()
    assert (drawn < high).all()
    assert drawn[0].max() == 0
    assert set(drawn[1].tolist()) == {0, 1}
    assert drawn[2].max() > 2**31 * 0.999


GOLDEN = [424, 415, 195, 882, 354, 233, 120, 500, 319, 408, 163, 606]
