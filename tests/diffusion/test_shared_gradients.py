import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from diffkd.diffusion import passes as shared_gradients
from diffkd.diffusion.passes import is_wide, linear_passes

ROWS = 2


@pytest.fixture(autouse=True)
def no_caches(monkeypatch):
    """Layers of a test's size count as large."""
    monkeypatch.setattr(shared_gradients, "CACHED", 0)


def layer(bias=True, inputs=8, outputs=12):
    return nn.Linear(inputs, outputs, bias=bias).double()


def chain(linear, back, x, passes, *, shared):
    """The layer, `passes` times, each on what the last made of it; returns what each pass gives."""
    runs = linear_passes(linear, [len(x)] * passes) if shared else [linear] * passes
    assert (runs[0] is linear) is not shared
    outputs = []
    for run in runs:
        x = torch.tanh(run(x)) @ back
        outputs.append(x)
    return outputs


def gradients(linear, loss, x, **options):
    return torch.autograd.grad(loss, [x, *linear.parameters()], **options)


def both(passes=4, bias=True, rows=ROWS):
    """The same chain, shared and not, with its layer and input."""
    linear, back = layer(bias), torch.randn(12, 8, dtype=torch.float64)
    x = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    return linear, x, [chain(linear, back, x, passes, shared=shared) for shared in (True, False)]


@given(
    st.integers(2, 7), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 1000)
)
@settings(max_examples=20)
def test_outputs_and_gradients_are_the_layers_own(passes, rows, inputs, outputs, bias, seed):
    torch.manual_seed(seed)
    linear, back = layer(bias, inputs, outputs), torch.randn(outputs, inputs, dtype=torch.float64)
    x = torch.randn(rows, inputs, dtype=torch.float64, requires_grad=True)
    runs = linear_passes(linear, [rows] * passes)
    pays = rows * (inputs + outputs) < inputs * outputs
    assert (runs[0] is not linear) is pays
    found = []
    for each in (runs, [linear] * passes):
        h = x
        for run in each:
            h = torch.tanh(run(h)) @ back / outputs
        found.append([h, *gradients(linear, h.square().sum(), x)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reached", [0, 2])
def test_passes_outside_a_backward_leave_nothing_behind(reached):
    linear, x, (shared, plain) = both()
    losses = [outputs[reached].square().sum() for outputs in (shared, plain)]
    for _ in range(2):
        ours, theirs = (gradients(linear, loss, x, retain_graph=True) for loss in losses)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    # Nor does a gradient of the input alone, which needs no weight's.
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, x, retain_graph=True) for loss in losses), rtol=1e-12, atol=1e-12
    )
    ours, theirs = (gradients(linear, outputs[3].sum(), x) for outputs in (shared, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_forward_without_backward_leaves_nothing_behind():
    linear, x, _ = both()
    linear_passes(linear, [ROWS] * 3)[0](x)
    runs = linear_passes(linear, [ROWS] * 3)
    sum(run(x).sum() for run in runs).backward()
    torch.testing.assert_close(linear.weight.grad, 3 * x.detach().sum(dim=0).expand(12, 8), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear.bias.grad, torch.full((12,), 3.0 * ROWS, dtype=torch.float64))
    again = copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))
    assert all(torch.equal(one.weight, linear.weight) for one in again)


def test_gradients_accumulate_over_backwards():
    linear, x, (shared, plain) = both()
    for outputs in (shared, plain):
        outputs[-1].sum().backward(retain_graph=True)
        outputs[1].sum().backward()
        if outputs is shared:
            ours = [linear.weight.grad.clone(), x.grad.clone()]
            linear.zero_grad()
            x.grad = None
    torch.testing.assert_close(ours, [linear.weight.grad, x.grad], rtol=1e-12, atol=1e-12)


def test_gradients_can_be_differentiated_again():
    linear, x, outputs = both()
    seconds = []
    for (*_, last), options in zip(outputs, ({}, {}), strict=True):
        first = gradients(linear, last.square().sum(), x, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        seconds.append(gradients(linear, penalty, x, **options))
    torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-9)


def test_a_weights_gradient_arrives_once():
    """Distributed training reduces a gradient when its hook fires, and must not do so too early or twice."""
    linear, _, (shared, _) = both()
    fired = []
    linear.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.clone()))
    shared[-1].sum().backward()
    assert len(fired) == 1
    assert torch.equal(fired[0], linear.weight.grad)


def test_changing_the_weight_before_the_backward_is_noticed():
    linear, _, (shared, _) = both()
    with torch.no_grad():
        linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        shared[-1].sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_the_layer_does(dtype):
    linear = nn.Linear(64, 96)
    x = torch.randn(4, 64, requires_grad=True)
    found = []
    for shared in (True, False):
        linear.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            runs = linear_passes(linear, [4] * 3) if shared else [linear] * 3
            outputs = [run(x) for run in runs]
        assert all(out.dtype == dtype for out in outputs)
        sum(out.float().square().sum() for out in outputs).backward()
        found.append((outputs[0], linear.weight.grad, linear.bias.grad))
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def hooked(linear):
    linear.register_forward_hook(lambda module, args, out: out * 2)
    return linear


def frozen(linear):
    linear.bias.requires_grad_(False)
    return linear


@pytest.mark.parametrize("change", [hooked, frozen, weight_norm], ids=["hook", "frozen", "parametrised"])
def test_more_than_a_plain_layer_is_left_as_it_is(change):
    linear = change(layer())
    assert linear_passes(linear, [1] * 3) == [linear] * 3


def test_without_gradients_or_with_one_pass_the_layer_is_left_as_it_is():
    linear = layer()
    assert linear_passes(linear, [1]) == [linear]
    with torch.no_grad():
        assert linear_passes(linear, [1] * 3) == [linear] * 3


def test_a_layer_is_wide_if_neither_a_cache_nor_what_passes_through_it_is_as_large(monkeypatch):
    linear = nn.Linear(8, 12)  # 96 entries, 20 per row
    assert is_wide(linear, 4)
    assert not is_wide(linear, 5)
    monkeypatch.setattr(shared_gradients, "CACHED", 96)
    assert not is_wide(linear, 4)
