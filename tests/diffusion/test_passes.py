import copy

import pytest
import torch
from benchmarks.memory import peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EXACT

from diffkd import DiffKD
from diffkd.diffusion import passes as shared_gradients
from diffkd.diffusion.modules import Denoiser
from diffkd.diffusion.passes import DenoiserPasses


@pytest.fixture
def no_caches(monkeypatch):
    """Layers of a test's size count as large."""
    monkeypatch.setattr(shared_gradients, "CACHED", 0)


def outcome(model, student, teacher, given, autocast=None):
    """One forward and backward: outputs, losses, all gradients and all buffers."""
    model, student = copy.deepcopy(model), student.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        result = model(student, teacher, **given)
    sum(result.losses.values()).backward()
    state = [result.denoised, result.target, result.gamma, *result.losses.values(), student.grad, *model.buffers()]
    return state + [p.grad for p in model.parameters()]


def inputs(model, batch, size, dtype=torch.float32):
    student, teacher = (
        torch.randn(batch, channels, *size, dtype=dtype)
        for channels in (model.student_channels, model.teacher_channels)
    )
    latent = (batch, model.latent_channels, *size)
    given = {"noise": torch.randn(latent, dtype=dtype), "diffusion_noise": torch.randn(latent, dtype=dtype)}
    return student, teacher, given | {"timesteps": torch.randint(1000, (batch,))}


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(1, 9)),
    st.integers(1, 6),
    st.integers(1, 5),
    st.one_of(st.just(()), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    st.booleans(),
    st.sampled_from([None, torch.bfloat16]),
)
@settings(max_examples=12)
def test_checkpointing_is_equal_to_the_last_bit(channels, latent, ae, steps, batch, size, training, autocast):
    kind = "map" if size else "vector"
    model = DiffKD(channels, latent, kind=kind, ae_channels=ae, inference_steps=steps).train(training)
    drawn = inputs(model, batch, size)
    kept = outcome(model, *drawn, autocast)
    model.checkpoint = True
    for ours, theirs in zip(outcome(model, *drawn, autocast), kept, strict=True):
        assert torch.equal(ours, theirs)


def test_checkpointing_needs_less_memory():
    def step(checkpoint):
        def make():
            model = DiffKD(16, 16, checkpoint=checkpoint)
            student, teacher, given = inputs(model, 4, (24, 24))
            student.requires_grad_()
            return lambda: sum(model(student, teacher, **given).losses.values()).backward()

        return peak_bytes(make)

    assert step(True) < 0.6 * step(False)


def test_checkpointing_a_second_backward_repeats_the_first():
    model = DiffKD(6, 6, kind="vector", checkpoint=True).double()
    student, teacher, given = inputs(model, 4, (), torch.float64)
    loss = sum(model(student, teacher, **given).losses.values())
    buffers = [buffer.clone() for buffer in model.buffers()]
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


@pytest.mark.parametrize(("size", "rows"), [((), 1), ((), 2), ((), 6), ((), 40), ((2, 3), 4)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.usefixtures("no_caches")
def test_passes_equal_the_denoiser_called_as_often(size, rows, training, steps):
    denoiser = Denoiser(30, is_map=bool(size)).double().train(training)
    plain = copy.deepcopy(denoiser)
    x, noisy = torch.randn(2, rows, 30, *size, dtype=torch.float64)
    chain, timesteps = torch.tensor([300, 20, 0])[:steps], torch.arange(rows) * 7
    found = []
    for model in (denoiser, plain):
        passes = DenoiserPasses(denoiser, chain, noisy, timesteps)
        h = x.clone().requires_grad_()
        start = h
        for t in chain:
            h = h + (passes.step(h) if model is denoiser else plain(h, t[None]))
        beside = passes.extra() if model is denoiser else plain(noisy, timesteps)
        (h.square().sum() + beside.pow(3).sum()).backward()
        found.append([h, beside, start.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        if model is denoiser:
            # With few samples, the weights are what a pass costs.
            assert passes.together == (not size and rows <= 6)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_no_more_steps_than_planned():
    passes = DenoiserPasses(Denoiser(4, is_map=False), torch.tensor([0]), torch.randn(2, 4), torch.tensor([3, 5]))
    passes.step(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="1 denoising steps were planned"):
        passes.step(torch.randn(2, 4))


@pytest.mark.parametrize("size", [(), (3, 4)], ids=["vector", "map"])
def test_bf16_stays_within_its_rounding(size):
    model = DiffKD(24, 24, kind="map" if size else "vector")
    drawn = inputs(model, 16, size)
    exact, half = outcome(model, *drawn), outcome(model, *drawn, torch.bfloat16)
    for index in (0, 2, 3, 4):  # denoised, gamma and the losses
        assert (half[index] - exact[index]).abs().max() < 0.1 * exact[index].abs().max()
        assert half[index].dtype == torch.float32
    scale = max(float(g.abs().max()) for g in exact[5:] if g.is_floating_point())
    assert all(((a - b).abs().max() < 0.1 * scale) for a, b in zip(half[5:], exact[5:], strict=True))


def test_compiles_whole_and_equals_eager_with_checkpointing():
    # "aot_eager" traces forward and backward as every backend gets them, without a C++ compiler.
    model = DiffKD(20, 24, kind="vector", inference_steps=1, checkpoint=True).double()
    drawn = inputs(model, 3, (), torch.float64)
    compiled = copy.deepcopy(model)
    student = drawn[0].clone().requires_grad_()
    try:
        result = torch.compile(compiled, fullgraph=True, backend="aot_eager")(student, drawn[1], **drawn[2])
        sum(result.losses.values()).backward()
    finally:
        torch.compiler.reset()
    ours = [result.denoised, student.grad, *compiled.buffers(), *(p.grad for p in compiled.parameters())]
    expected = outcome(model, *drawn)
    for mine, theirs in zip(ours, [expected[0], *expected[5:]], strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("size", [(), (3, 4)], ids=["vector", "map"])
def test_never_waits_for_a_number_of_the_device(size, checkpoint):
    """On the meta device there are no numbers to wait for: whatever reads one raises."""
    model = DiffKD(30, 30, kind="map" if size else "vector", checkpoint=checkpoint).to("meta")
    student = torch.randn(4, 30, *size, device="meta", requires_grad=True)
    result = model(student, torch.randn(4, 30, *size, device="meta"))
    sum(result.losses.values()).backward()
    assert student.grad.shape == student.shape
    assert all(p.grad is not None for p in model.parameters())
