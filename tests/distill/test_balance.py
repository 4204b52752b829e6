"""Weights that follow the gradients, and how hard a pair pulls."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_nets import ConvNet
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from diffkd import KD, Balance, DiffKD, Distiller, FitNet, Pair
from diffkd.methods.reviewkd import ReviewKD

torch.manual_seed(0)
IMAGES = torch.linspace(-1, 1, 4 * 3 * 16 * 16, dtype=torch.float64).sin().reshape(4, 3, 16, 16)
LABELS = torch.tensor([0, 3, 5, 9])


def make(*pairs, norm=True):
    torch.manual_seed(0)
    student, teacher = ConvNet(4, norm=norm).double(), ConvNet(6, norm=norm).double()
    return Distiller(student, teacher, list(pairs), example=IMAGES[:2]).double()


def step(distiller, images=IMAGES, labels=LABELS, call=None):
    output, losses = (distiller if call is None else call)(images)
    task = F.cross_entropy(output, labels)
    return task, losses, distiller.balance(losses, task)


def gradient(loss, distiller, layer, scale=1.0):
    """The gradient at a layer's output by a derivation of its own: that of a number added to the output."""
    added = {}

    def add(module, args, output):
        added["zero"] = torch.zeros_like(output, requires_grad=True)
        return output + added["zero"]

    module = distiller.student if layer == "output" else distiller.student.get_submodule(layer)
    handle = module.register_forward_hook(add, prepend=True)
    try:
        value = loss(distiller)
    finally:
        handle.remove()
    (found,) = torch.autograd.grad(value, added["zero"])
    return found.norm()


def term(name):
    return lambda distiller: sum(loss for key, loss in distiller(IMAGES)[1].items() if key.startswith(f"{name}/"))


def of_task(distiller):
    return F.cross_entropy(distiller(IMAGES)[0], LABELS)


@pytest.mark.parametrize("layer", ["stem", "stage"])
def test_the_pull_is_what_was_asked_for(layer):
    distiller = make(Pair(layer, method=FitNet, weight=Balance(0.7)), Pair("output", method=KD, weight=3.0))
    plain = make(Pair(layer, method=FitNet), Pair("output", method=KD, weight=3.0))
    plain.load_state_dict(
        {name: value for name, value in distiller.state_dict().items() if not name.startswith("balancer")}
    )
    _, before, after = step(distiller)
    expected = 0.7 * gradient(of_task, copy.deepcopy(plain), layer) / gradient(term(layer), plain, layer)
    raw = plain(IMAGES)[1]
    assert before[f"{layer}/kd"] == 0
    torch.testing.assert_close(after[f"{layer}/kd"], expected * raw[f"{layer}/kd"], rtol=1e-5, atol=0)
    assert torch.equal(after["output/kd"], before["output/kd"])
    torch.testing.assert_close(distiller.weights()[layer].double(), expected, rtol=1e-5, atol=0)


def test_maps_outputs_several_levels_and_diffusion_are_balanced():
    levels = Pair(["stem", "stage"], method=ReviewKD, weight=Balance(1.0, every=1), name="levels")
    distiller = make(Pair("output", method=DiffKD, weight=Balance(2.0, every=1)), levels)
    for index in range(3):
        task, _, losses = step(distiller)
        distiller.zero_grad()
        (task + sum(losses.values())).backward()
        assert all(loss.isfinite() and loss > 0 for loss in losses.values()), index
    assert (distiller.balancer.norms > 0).all()
    assert set(distiller.weights()) == {"output", "levels"}


def test_it_is_measured_every_so_often_and_averaged():
    distiller = make(Pair("stage", method=FitNet, weight=Balance(every=3, momentum=0.5)))
    weights, norms = [], []
    for _ in range(7):
        assert distiller.due == (len(weights) % 3 == 0)
        task, _, losses = step(distiller)
        weights.append(float(distiller.weights()["stage"]))
        distiller.zero_grad()
        (task + sum(losses.values())).backward()
        with torch.no_grad():
            for parameter in distiller.parameters():
                parameter.sub_(0.05 * parameter.grad)
        norms.append(distiller.balancer.norms.clone())
    assert weights[0] == weights[1] == weights[2] != weights[3] == weights[5] != weights[6]
    assert not torch.equal(norms[3], norms[0])


def test_it_goes_on_where_it_was():
    pair = Pair("stage", method=FitNet, weight=Balance(every=2))
    distiller, other = make(pair), make(pair)
    for _ in range(3):
        step(distiller)
    other.load_state_dict(distiller.state_dict())
    assert not other.due
    for _ in range(3):
        first, second = step(distiller), step(other)
        assert torch.equal(first[2]["stage/kd"], second[2]["stage/kd"])
    assert torch.equal(distiller.balancer.norms, other.balancer.norms)


def test_without_a_balance_nothing_is_kept_and_nothing_changes():
    distiller = make(Pair("stage", method=FitNet))
    assert not any("balancer" in name for name in distiller.state_dict())
    _, before, after = step(distiller)
    assert before == after
    assert distiller._measurable is None


def test_the_gradients_of_the_training_are_the_same_with_a_measurement_between():
    results = []
    for watched in (False, True):
        distiller = make(Pair("stage", method=FitNet), Pair("output", method=DiffKD))
        distiller.watched = watched
        torch.manual_seed(5)
        output, losses = distiller(IMAGES)
        task = F.cross_entropy(output, LABELS)
        pulls = distiller.pulls(task)
        assert (pulls is not None) == watched
        (task + sum(losses.values())).backward()
        results.append([p.grad for p in distiller.parameters()])
        distiller._measurable = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_balance_that_nobody_asks_is_an_error():
    distiller = make(Pair("stage", method=FitNet, weight=Balance(every=2)))
    distiller(IMAGES)
    with pytest.raises(RuntimeError, match=r"losses = distiller.balance\(losses, task_loss\)"):
        distiller(IMAGES)


def test_a_layer_that_the_task_does_not_use_is_named():
    distiller = make(Pair("stage", method=FitNet, weight=Balance()))
    _, losses = distiller(IMAGES)
    with pytest.raises(ValueError, match="pair 'stage' has a Balance, but the task's loss does not depend"):
        distiller.balance(losses, nn.Parameter(torch.ones(())) * 2)


def test_compiled_between_two_measurements():
    distiller = make(Pair("stage", method=FitNet, weight=Balance(every=3)))
    twin = copy.deepcopy(distiller)
    compiled = torch.compile(distiller, backend="aot_eager", fullgraph=True)
    try:
        for _ in range(5):
            expected = step(twin)[2]
            found = step(distiller, call=distiller if distiller.due else compiled)[2]
            torch.testing.assert_close(found["stage/kd"], expected["stage/kd"], rtol=1e-9, atol=0)
        compiled(IMAGES)
        distiller.balancer.calls = 6
        with pytest.raises(RuntimeError, match="no gradients to balance by: call the distiller"):
            distiller.balance({}, torch.ones(()))
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("values", [(0.0,), (-1.0,), (float("nan"),), (1.0, 0), (1.0, 1, 1.0)])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="a Balance needs balance > 0"):
        Balance(*values)


def worker(rank, address, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    distiller = make(Pair("stage", method=FitNet, weight=Balance(every=2)), norm=False)
    parallel = DistributedDataParallel(distiller)
    half = slice(2 * rank, 2 * rank + 2)
    for _ in range(3):
        distiller.zero_grad()
        task, _, losses = step(distiller, IMAGES[half], LABELS[half], call=parallel)
        (task + sum(losses.values())).backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters()}
    torch.save(gradients | {"norms": distiller.balancer.norms}, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_weight_of_one(tmp_path):
    start_processes(
        partial(worker, address=str(tmp_path / "meet"), results=str(tmp_path)), nprocs=2, start_method="forkserver"
    )
    alone = make(Pair("stage", method=FitNet, weight=Balance(every=2)), norm=False)
    for _ in range(3):
        alone.zero_grad()
        task, _, losses = step(alone)
        (task + sum(losses.values())).backward()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(found[0]["norms"], found[1]["norms"])
    ratios = [norms[:, 1] / norms[:, 0] for norms in (found[0]["norms"], alone.balancer.norms)]
    torch.testing.assert_close(*ratios, rtol=1e-5, atol=0)
    for name, parameter in alone.named_parameters():
        # The weight is float32.
        torch.testing.assert_close(found[0][name], parameter.grad, rtol=1e-5, atol=1e-8)


def test_automatic_pairs_on_features_are_balanced():
    torch.manual_seed(0)
    options = {"example": IMAGES[:2], "balance": Balance(0.5)}
    distiller = Distiller(ConvNet(4).double(), ConvNet(6).double(), **options).double()
    assert [pair.weight for pair in distiller.pairs] == [Balance(0.5), 1.0]
    task, _, losses = step(distiller)
    (task + sum(losses.values())).backward()
    with pytest.raises(ValueError, match="give it as the weight of your own pairs"):
        Distiller(ConvNet(4).double(), ConvNet(6).double(), [Pair("stage")], **options)
