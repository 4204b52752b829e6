"""Learning rates by epoch, and what the optimiser decays."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import EXACT
from torch import nn

from diffkd.training.optimization import Schedule, build_optimizer, set_learning_rate, takes_channels_last

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
        {"every": math.nan},
        {"factor": math.inf},
        {"power": math.nan},
        {"warmup_epochs": math.nan},
        {"milestones": [30, -5]},
        {"milestones": [math.nan]},
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


@pytest.mark.parametrize("values", [{"lr": math.nan}, {"lr": math.inf}, {"lr": 0.1, "momentum": math.nan}])
def test_values_that_are_no_numbers_are_refused(values):
    with pytest.raises(ValueError, match=r"(lr|momentum)=(nan|inf) of SGD is no number to learn with"):
        build_optimizer(nn.Linear(2, 2), partial(torch.optim.SGD, **values))


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


class TestOneKernelPerParameter:
    """On a CPU, PyTorch's optimisers step each parameter in one kernel, which looks at memory and not at strides."""

    FACTORIES = (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.Adam, lr=0.01, weight_decay=0.01),
        partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    )

    @staticmethod
    def train(model, optimizer, steps, layout=torch.contiguous_format):
        x = (
            torch.linspace(-1, 1, 2 * 3 * 6 * 6, dtype=torch.float64)
            .reshape(2, 3, 6, 6)
            .contiguous(memory_format=layout)
        )
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    @staticmethod
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 3)).double()

    @pytest.mark.parametrize("factory", FACTORIES)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_it_steps_as_the_separate_operations_do(self, factory, layout):
        ours, plain = self.net().to(memory_format=layout), self.net()
        optimizer = build_optimizer(ours, factory)
        assert all(group["fused"] for group in optimizer.param_groups)
        self.train(ours, optimizer, 5, layout)
        self.train(plain, factory(plain.parameters()), 5)
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, **EXACT)

    def test_a_state_of_another_layout_is_taken_over(self):
        factory = self.FACTORIES[0]
        plain, ours = self.net(), self.net().to(memory_format=torch.channels_last)
        first = build_optimizer(plain, factory)
        self.train(plain, first, 3)
        ours.load_state_dict(plain.state_dict())
        second = build_optimizer(ours, factory)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        self.train(plain, first, 3)
        self.train(ours, second, 3)
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, **EXACT)

    def test_a_gradient_of_another_layout_is_taken_as_it_is_meant(self):
        weight = nn.Parameter(torch.zeros(2, 3, 2, 2))
        optimizer = build_optimizer(nn.ParameterList([weight]), partial(torch.optim.SGD, lr=1.0))
        gradient = torch.arange(24.0).reshape(2, 3, 2, 2)
        weight.grad = gradient.clone(memory_format=torch.contiguous_format).to(memory_format=torch.channels_last)
        optimizer.step()
        assert torch.equal(weight, -gradient)

    def test_sparse_gradients_are_stepped_one_operation_at_a_time(self):
        table = nn.Embedding(4, 2, sparse=True)
        before = table.weight.detach().clone()
        optimizer = build_optimizer(table, partial(torch.optim.SGD, lr=1.0))
        table(torch.tensor([1])).sum().backward()
        optimizer.step()
        assert (table.weight - before).nonzero()[:, 0].unique().tolist() == [1]

    @pytest.mark.parametrize("option", [{"fused": False}, {"foreach": True}, {"differentiable": True}])
    def test_what_was_asked_for_is_left_alone(self, option):
        optimizer = build_optimizer(self.net(), partial(torch.optim.SGD, lr=0.1, **option))
        assert not any(group["fused"] for group in optimizer.param_groups)

    def test_other_optimisers_are_left_alone(self):
        model = self.net()
        before = [p.detach().clone() for p in model.parameters()]
        self.train(model, build_optimizer(model, partial(torch.optim.RMSprop, lr=0.01)), 1)
        assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("factory", "takes"),
    [
        (SGD, True),
        (torch.optim.AdamW, True),
        (torch.optim.LBFGS, False),
        (partial(torch.optim.LBFGS, line_search_fn="strong_wolfe"), False),
        (partial(torch.optim.SGD, lr=-1.0), True),  # which fails for another reason
    ],
)
def test_optimisers_that_view_parameters_as_rows_are_found_out(factory, takes):
    assert takes_channels_last(factory) == takes
