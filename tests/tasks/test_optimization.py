"""Learning rates by epoch, and what the optimiser decays."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffkd.tasks.optimization import Schedule, build_optimizer, set_learning_rate

SGD = partial(torch.optim.SGD, lr=0.5, weight_decay=0.1)


def test_step_by_milestones():
    a1 = Schedule("step", milestones=[150, 180, 210], factor=0.1)
    rates = [a1(epoch, 240) for epoch in (0, 149.999, 150, 180, 239.9)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.001])


def test_step_by_period():
    b2 = Schedule("step", every=2.4, factor=0.97)
    assert [b2(epoch, 450) for epoch in (2.39, 2.4, 24.0)] == pytest.approx([1, 0.97, 0.97**10])


def test_exponential_is_smooth():
    schedule = Schedule("exponential", every=2, factor=0.25)
    assert [schedule(epoch, 9) for epoch in (0, 1, 2, 5)] == pytest.approx([1, 0.5, 0.25, 1 / 32])


def test_cosine_starts_after_warmup_and_arrives_at_its_floor():
    schedule = Schedule("cosine", warmup_epochs=2, floor=0.1)
    assert [schedule(epoch, 10) for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])


def test_poly_falls_to_zero_by_its_power():
    """Of 40,000 iterations, as in DeepLab: the rate of iteration i is (1 - i / 40,000) ** 0.9."""
    epochs, steps = 215, 186  # 2,975 images in batches of 16
    poly = Schedule("poly")
    assert poly(0, epochs) == 1
    for done in (1, 20_000, 39_989):
        assert poly(done / steps, epochs) == pytest.approx((1 - done / (epochs * steps)) ** 0.9)
    assert poly(epochs, epochs) == 0
    assert Schedule("poly", power=1)(3, 4) == pytest.approx(0.25)


def test_poly_starts_after_warmup_and_arrives_at_its_floor():
    schedule = Schedule("poly", power=2, warmup_epochs=2, floor=0.1)
    assert [schedule(epoch, 10) for epoch in (1, 2, 6, 10)] == pytest.approx([0.5, 1, 0.1 + 0.9 / 4, 0.1])


def test_warmup_starts_where_it_is_told():
    assert Schedule("constant", warmup_epochs=4, warmup_start=0.2)(1, 10) == pytest.approx(0.4)


def test_per_epoch_holds_within_an_epoch():
    schedule = Schedule("cosine", per="epoch")
    assert schedule(3.9, 10) == schedule(3.0, 10) == Schedule("cosine")(3.0, 10)


@given(
    st.sampled_from(["constant", "step", "exponential", "cosine", "poly"]),
    st.integers(1, 300),
    st.floats(0, 1),
    st.floats(0, 20),
    st.sampled_from(["step", "epoch"]),
)
def test_factors_lie_between_0_and_1_and_never_rise_after_warmup(kind, epochs, share, warmup, per):
    schedule = Schedule(kind, factor=0.5, every=3.0, warmup_epochs=warmup, per=per)
    epoch = share * epochs
    later = epoch + (epochs - epoch) / 2
    assert 0 <= schedule(epoch, epochs) <= 1
    if epoch >= math.ceil(warmup):
        assert schedule(later, epochs) <= schedule(epoch, epochs)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "linear"},
        {"every": 0},
        {"factor": 0},
        {"power": 0},
        {"warmup_epochs": -1},
        {"warmup_start": 2},
        {"floor": -1},
    ],
)
def test_nonsense_is_refused(values):
    with pytest.raises(ValueError, match="schedule"):
        Schedule(**values)


def test_normalisation_and_biases_need_not_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = build_optimizer(model, SGD, decay_all=False)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.1, 0, 0, 0]
    (group,) = build_optimizer(model, SGD).param_groups
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == 4


def test_frozen_parameters_are_left_out_and_a_frozen_model_is_refused():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert build_optimizer(model, SGD).param_groups[0]["params"] == [model.weight]
    with pytest.raises(ValueError, match="no trainable"):
        build_optimizer(model.requires_grad_(False), SGD)


def test_rates_are_set_from_the_peak_again_and_again():
    optimizer = build_optimizer(nn.Linear(2, 2), SGD)
    for factor in (0.5, 0.5, 0.1):
        set_learning_rate(optimizer, factor)
        assert optimizer.param_groups[0]["lr"] == 0.5 * factor
