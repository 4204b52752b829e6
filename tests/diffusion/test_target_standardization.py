"""Targets standardised by running statistics."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from diffkd.diffusion.standardization import Standardization


def feature(batch, size=(3, 4), channels=5):
    scales = torch.tensor([1.0, 30.0, 0.2, 4.0, 7.0], dtype=torch.float64)[:channels]
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    return (x + 2) * scales.reshape(-1, *[1] * len(size))


def moments(x):
    flat = x.movedim(1, 0).flatten(1)
    return flat.mean(dim=1), flat.var(dim=1, correction=0)


@pytest.mark.parametrize("size", [(3, 4), ()])
def test_the_first_batches_count_as_one(size):
    module = Standardization(5).double()
    batches = [feature(6, size) for _ in range(4)]
    for batch in batches:
        result = module(batch)
    mean, variance = moments(torch.cat(batches))
    torch.testing.assert_close(module.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.variance, variance, rtol=1e-12, atol=1e-12)
    shape = (-1, *[1] * len(size))
    expected = (batches[-1] - mean.reshape(shape)) / variance.sqrt().reshape(shape)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.restore(result), batches[-1], rtol=1e-12, atol=1e-12)
    assert int(module.batches) == 4


def test_the_first_batch_is_standardised_by_itself():
    mean, variance = moments(Standardization(5).double()(feature(8)))
    torch.testing.assert_close(mean, torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(variance, torch.ones(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_later_batches_are_forgotten_by_the_momentum():
    module = Standardization(5, momentum=0.25).double()
    weights, batches = [], [feature(6) for _ in range(9)]
    for index, batch in enumerate(batches):
        share = max(1 / (index + 1), 0.25)
        weights = [*(weight * (1 - share) for weight in weights), share]
        module(batch)
    # Moments about 0 average linearly, which is another derivation of the variance.
    first = sum(weight * moments(batch)[0] for weight, batch in zip(weights, batches, strict=True))
    second = sum(weight * moments(batch**2)[0] for weight, batch in zip(weights, batches, strict=True))
    torch.testing.assert_close(module.mean, first, rtol=1e-11, atol=0)
    torch.testing.assert_close(module.variance, second - first**2, rtol=1e-10, atol=0)


def test_evaluation_leaves_the_statistics():
    module = Standardization(5).double()
    assert torch.equal(module.eval()(x := feature(3)), x)
    module.train()(feature(3))
    before = copy.deepcopy(module.state_dict())
    module.eval()(feature(3))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    other = Standardization(5).double()
    other.load_state_dict(before)
    assert torch.equal(other.eval()(x), module(x))


def test_a_silent_channel_is_not_blown_up():
    x = feature(8)
    x[:, 2] = 0
    x[0, 2, 0, 0] = 1e-9
    result = Standardization(5).double()(x)
    assert result[:, 2].abs().max() < 1e-6
    assert torch.equal(Standardization(5)(torch.zeros(2, 5)), torch.zeros(2, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_in_float32(dtype):
    module = Standardization(5).to(dtype)
    assert module.mean.dtype == module.variance.dtype == torch.float32
    x = feature(8).to(dtype)
    with torch.autocast("cpu", dtype):
        result = module(x)
    assert result.dtype == torch.float32
    exact = Standardization(5).double()
    # Inputs alike, so that what differs is rounding in float32: 96 entries a channel are summed up, with means of up to
    # twice the deviation; 1e-5 is more than 96 units of 6e-8.
    torch.testing.assert_close(result.double(), exact(x.double()), rtol=1e-5, atol=1e-5)
    assert module.double().mean.dtype == torch.float64


def test_no_gradient_passes_through_the_statistics():
    x = feature(4).requires_grad_()
    module = Standardization(5).double()
    module(x).sum().backward()
    expected = (1 / module.variance.sqrt())[:, None, None].expand_as(x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum": 1.5}, {"floor": 1.0}])
def test_bad_values_are_refused(options):
    with pytest.raises(ValueError, match=r"momentum in \(0, 1\] and a floor in \[0, 1\)"):
        Standardization(5, **options)


def parts_of(index):
    """Two batches, of which two processes get 5 and 3 samples each."""
    torch.manual_seed(index)
    return feature(8).split([5, 3])


def worker(rank, address, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    module = Standardization(5).double()
    for index in range(2):
        module(parts_of(index)[rank])
    torch.save(module.state_dict(), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_their_statistics(tmp_path):
    start_processes(
        partial(worker, address=str(tmp_path / "meet"), results=str(tmp_path)), nprocs=2, start_method="forkserver"
    )
    alone = Standardization(5).double()
    for index in range(2):
        alone(torch.cat(parts_of(index)))
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_batch_that_is_not_finite_is_left_out(first, value):
    batches = [feature(4) for _ in range(3)]
    bad = feature(4)
    bad[1, 2] = value
    module, expected = Standardization(5).double(), Standardization(5).double()
    for batch in [bad, *batches] if first else [batches[0], bad, *batches[1:]]:
        module(batch)
    for batch in batches:
        expected(batch)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in expected.state_dict().items())
