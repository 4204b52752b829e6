import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_diffkd import Parameters, plain_diffkd
from rounding import assert_rounded, units_of
from torch import nn

from diffkd import DiffKD, FeatureShape
from diffkd.diffusion.modules import Denoiser
from diffkd.official import their_name, to_official_state

CASES = {
    "map": ({"student_channels": 6, "teacher_channels": 8, "kind": "map"}, (3, 4), 5),
    "map with autoencoder": ({"student_channels": 6, "teacher_channels": 16, "ae_channels": 9}, (4, 3), 5),
    "map in three steps": ({"student_channels": 8, "teacher_channels": 4, "inference_steps": 3}, (3, 3), 3),
    "vector": ({"student_channels": 10, "teacher_channels": 10, "kind": "vector"}, (1, 1), 5),
    "vector with autoencoder": (
        {"student_channels": 7, "teacher_channels": 10, "kind": "vector", "ae_channels": 12},
        (1, 1),
        5,
    ),
    "the paper's map": ({"student_channels": 6, "teacher_channels": 8, "variant": "paper"}, (3, 4), 5),
    "the paper's map with autoencoder": (
        {"student_channels": 6, "teacher_channels": 16, "ae_channels": 9, "variant": "paper", "inference_steps": 2},
        (4, 3),
        2,
    ),
    "the paper's vector": (
        {"student_channels": 10, "teacher_channels": 10, "kind": "vector", "variant": "paper"},
        (1, 1),
        5,
    ),
}


def randomise(model: nn.Module) -> None:
    """Move every parameter and statistic away from its tell-tale 0 or 1."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and value.ndim == 1:
            value.add_(0.3 * torch.randn_like(value))


def draws(shape, dtype):
    return {
        "noise": torch.randn(shape, dtype=dtype),
        "diffusion_noise": torch.randn(shape, dtype=dtype),
        "timesteps": torch.randint(1000, shape[:1]),
    }


def assert_close(actual, expected, tolerance, scale=None):
    """Relative to the largest entry of the group: many gradients are zero but for rounding."""
    scale = float(expected.detach().abs().max()) if scale is None else scale
    assert float((actual.reshape(expected.shape) - expected).detach().abs().max()) <= tolerance * max(scale, 1e-30)


def gradients(**tensors):
    return {f"gradient of {name}": x.grad for name, x in tensors.items() if x.grad is not None}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("dtype", "repeats"),
    [(torch.float64, 4), (torch.float32, 8)],  # in float64, no ReLU's input is zero but for rounding
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_transcription(case, dtype, repeats, training):
    options, size, steps = CASES[case]
    model = DiffKD(**options).to(dtype).train(training)
    randomise(model)
    student = torch.randn(4, options["student_channels"], *size, dtype=dtype, requires_grad=True)
    teacher = torch.randn(4, options["teacher_channels"], *size, dtype=dtype, requires_grad=True)
    given = draws((4, model.latent_channels, *size), dtype)

    values = {name: value.clone() for name, value in to_official_state(model).items()}
    trainable = {their_name(name): p for name, p in model.named_parameters()}
    terms = ["kd", "diffusion"] + ["reconstruction"] * ("ae_channels" in options)

    def widened(x):
        return x.detach().double() if x.is_floating_point() else x

    def transcription():
        plain = Parameters({n: widened(x) for n, x in values.items()}, training, options.get("variant") == "paper")
        leaves = {name: plain.values[name].requires_grad_() for name in trainable}
        inputs = {"student": widened(student).requires_grad_(), "teacher": widened(teacher).requires_grad_()}
        noises = {name: widened(x) for name, x in given.items()}
        results = plain_diffkd(plain, **inputs, **noises, is_map=model.is_map, steps=steps)
        sum(results[term] for term in terms).backward()
        return results | gradients(**leaves, **inputs) | plain.updated

    result = model(student, teacher, **given)
    assert sorted(result.losses) == sorted(terms)
    sum(result.losses.values()).backward()
    found = {"denoised": result.denoised, "target": result.target, "gamma": result.gamma, **result.losses}
    found |= gradients(**trainable, student=student, teacher=teacher)
    found |= {name: x for name, x in to_official_state(model).items() if name not in trainable}
    assert_rounded(found, transcription, units_of(dtype), repeats)


def gradients_of(loss, model, *tensors):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, [*parameters, *tensors], allow_unused=True, retain_graph=True)
    parts = {name.split(".")[0] for name, g in zip(names, found, strict=False) if g is not None and g.abs().max() > 0}
    return parts, *(g is not None for g in found[len(names) :])


class TestWhereGradientsGo:
    def losses(self, **options):
        model = DiffKD(6, 8, **options)
        student, teacher = torch.randn(4, 6, 3, 3, requires_grad=True), torch.randn(4, 8, 3, 3, requires_grad=True)
        return model, student, teacher, model(student, teacher).losses

    def test_with_autoencoder(self):
        model, student, teacher, losses = self.losses(ae_channels=5)
        student_side = {"student_projection", "noise_adapter", "denoiser", "output_projection"}
        assert gradients_of(losses["kd"], model, student, teacher) == (student_side, True, False)
        assert gradients_of(losses["diffusion"], model, student, teacher) == ({"denoiser"}, False, False)
        assert gradients_of(losses["reconstruction"], model, student, teacher) == ({"autoencoder"}, False, True)

    def test_without_autoencoder_the_target_is_attached_as_in_the_authors_code(self):
        model, student, teacher, losses = self.losses()
        assert gradients_of(losses["kd"], model, student, teacher)[1:] == (True, True)
        assert gradients_of(losses["diffusion"], model, student, teacher) == ({"denoiser"}, False, True)

    def test_unless_it_is_detached(self):
        model, student, teacher, losses = self.losses(detach_target=True)
        assert gradients_of(losses["kd"], model, student, teacher)[1:] == (True, False)
        assert gradients_of(losses["diffusion"], model, student, teacher)[1:] == (False, False)

    def test_the_time_embedding_learns_from_the_diffusion_loss(self):
        model, *_, losses = self.losses()
        losses["diffusion"].backward()
        assert model.denoiser.time_embedding.weight.grad.abs().max() > 0


@given(
    student=st.integers(1, 20),
    teacher=st.integers(1, 20),
    ae=st.one_of(st.none(), st.integers(1, 20)),
    steps=st.integers(1, 8),
    batch=st.integers(1, 4),
    size=st.one_of(st.none(), st.tuples(st.integers(1, 6), st.integers(1, 6))),
    variant=st.sampled_from(["code", "paper"]),
    training=st.booleans(),
)
@settings(max_examples=40)
def test_any_shape_gives_finite_losses_and_gradients(student, teacher, ae, steps, batch, size, variant, training):
    shapes = [FeatureShape(channels, size or ()) for channels in (student, teacher)]
    model = DiffKD(*shapes, ae_channels=ae, inference_steps=steps, variant=variant).train(training)
    x = torch.randn(batch, student, *(size or ()), requires_grad=True)
    result = model(x, torch.randn(batch, teacher, *(size or ())))
    assert result.denoised.shape == result.target.shape == (batch, ae or teacher, *(size or ()))
    assert result.gamma.shape == (batch,)
    total = sum(result.losses.values())
    total.backward()
    assert total.isfinite()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_vectors_may_come_as_unit_maps():
    model = DiffKD(5, 7, kind="vector")
    student, teacher = torch.randn(4, 5), torch.randn(4, 7)
    given = draws((4, 7), torch.float32)
    flat = model(student, teacher, **given)
    unit = model(student[..., None, None], teacher[..., None, None], **given)
    assert unit.denoised.shape == unit.target.shape == (4, 7, 1, 1)
    assert torch.equal(unit.denoised[..., 0, 0], flat.denoised)
    given = {name: x[..., None, None] if x.ndim == 2 else x for name, x in given.items()}
    assert torch.equal(model(student, teacher, **given).denoised, flat.denoised)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_memory_layout_does_not_matter(layout):
    model = DiffKD(6, 8, ae_channels=4).double()
    features = [torch.randn(4, c, 3, 5, dtype=torch.float64) for c in (6, 8)]
    given = draws((4, 4, 3, 5), torch.float64)
    expected = copy.deepcopy(model)(*features, **given)
    if layout == "channels_last":
        features = [x.to(memory_format=torch.channels_last) for x in features]
    if layout == "permuted":
        features = [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in features]
    torch.testing.assert_close(model(*features, **given).denoised, expected.denoised, rtol=1e-10, atol=1e-10)


def test_draws_repeat_with_the_seed_and_happen_in_evaluation_too():
    model = DiffKD(6, 8).eval()
    student, teacher = torch.randn(2, 6, 3, 3), torch.randn(2, 8, 3, 3)
    torch.manual_seed(5)
    first = model(student, teacher)
    second = model(student, teacher)
    torch.manual_seed(5)
    again = model(student, teacher)
    assert torch.equal(first.denoised, again.denoised)
    assert torch.equal(first.losses["diffusion"], again.losses["diffusion"])
    assert not torch.equal(first.denoised, second.denoised)
    # Drawn in this order: the student's noise, the diffusion noise, the timesteps.
    torch.manual_seed(5)
    given = {"noise": torch.randn(2, 8, 3, 3), "diffusion_noise": torch.randn(2, 8, 3, 3)}
    given["timesteps"] = torch.randint(1000, (2,))
    assert torch.equal(model(student, teacher, **given).losses["diffusion"], first.losses["diffusion"])


def train_three_steps(dtype, kind):
    torch.manual_seed(0)
    size = (4, 4) if kind == "map" else ()
    model = DiffKD(FeatureShape(6, size), FeatureShape(8, size), ae_channels=5)
    student, teacher = nn.Parameter(torch.randn(8, 6, *size)), torch.randn(8, 8, *size)
    optimizer = torch.optim.SGD([*model.parameters(), student], lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            features = student * 1.0, teacher
            if dtype is not None:
                features = tuple(x.to(dtype) for x in features)
            result = model(*features)
            loss = sum(result.losses.values())
        assert result.denoised.dtype == loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad.isfinite().all() for p in [*model.parameters(), student])
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", ["map", "vector"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_finite_and_close(dtype, kind):
    """The authors' code turns to NaN on the second step, since its schedule is rounded."""
    assert train_three_steps(dtype, kind) == pytest.approx(train_three_steps(None, kind), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_cast_to_half_keeps_its_schedule(dtype):
    model, half = DiffKD(6, 8, ae_channels=5), None
    half = copy.deepcopy(model).to(dtype)
    assert torch.equal(half.alphas_cumprod_bits, model.alphas_cumprod_bits)
    student, teacher = torch.randn(4, 6, 3, 3), torch.randn(4, 8, 3, 3)
    given = draws((4, 5, 3, 3), torch.float32) | {"timesteps": torch.tensor([0, 1, 500, 999])}
    for _ in range(2):
        expected, result = model(student, teacher, **given), half(student.to(dtype), teacher.to(dtype), **given)
    assert all(loss.dtype == torch.float32 for loss in result.losses.values())
    for term, loss in expected.losses.items():
        torch.testing.assert_close(result.losses[term], loss, rtol=0.1, atol=0.05)
    sum(result.losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in half.parameters())


def test_half_precision_does_not_round_the_noise_away():
    """The first timestep keeps 0.9999 of the signal, which is 1 in bfloat16."""
    model = DiffKD(6, 8).bfloat16()
    seen = []
    model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher, given = torch.zeros(4, 8, 3, 3), draws((4, 8, 3, 3), torch.float32)
    model(torch.randn(4, 6, 3, 3), teacher, **given | {"timesteps": torch.zeros(4, dtype=torch.long)})
    torch.testing.assert_close(seen[-1], 0.01 * given["diffusion_noise"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(copied):
    model = DiffKD(6, FeatureShape(8, (3, 3), "logits"), ae_channels=5, temperature=2.0)
    twin = copied(model)
    student, teacher = torch.randn(4, 6, 3, 3), torch.randn(4, 8, 3, 3)
    given = draws((4, 5, 3, 3), torch.float32)
    for ours, theirs in zip(
        model(student, teacher, **given).losses.values(), twin(student, teacher, **given).losses.values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}


def test_the_schedule_is_not_in_the_state():
    state = DiffKD(6, 8, ae_channels=5).state_dict()
    assert not any("alphas" in name or "steps" in name for name in state)
    DiffKD(6, 8, ae_channels=5, inference_steps=2, beta_schedule="cosine").load_state_dict(state)


class OwnDenoiser(nn.Module):
    """The light denoiser by another name, with dropout of `p` before it."""

    def __init__(self, channels, is_map, p=0.0):
        super().__init__()
        self.dropout, self.network = nn.Dropout(p), Denoiser(channels, is_map)

    def forward(self, noisy, timesteps):
        assert timesteps.shape == noisy.shape[:1]
        return self.network(self.dropout(noisy), timesteps)


@pytest.mark.parametrize("size", [(3, 4), ()], ids=["map", "vector"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_denoiser_of_ones_own_takes_the_place_of_the_light_one(size, checkpoint):
    options = {"kind": "map" if size else "vector", "inference_steps": 3}
    light = DiffKD(6, 8, **options).double()
    own = DiffKD(6, 8, **options, denoiser=OwnDenoiser, checkpoint=checkpoint).double()
    own.load_state_dict({n.replace("denoiser.", "denoiser.network."): v for n, v in light.state_dict().items()})
    student, teacher = torch.randn(4, 6, *size).double(), torch.randn(4, 8, *size).double()
    given = draws((4, 8, *size), torch.float64)
    expected, result = light(student, teacher, **given), own(student, teacher, **given)
    assert_close(result.denoised, expected.denoised, 1e-12)
    for losses in (expected.losses, result.losses):
        sum(losses.values()).backward()
    for ours, theirs in zip(own.parameters(), light.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, 1e-9, max(float(p.grad.abs().max()) for p in light.parameters()))
    for ours, theirs in zip(own.buffers(), light.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12)


def test_a_denoiser_with_dropout_is_recomputed_as_it_was():
    model = DiffKD(6, 8, denoiser=partial(OwnDenoiser, p=0.5))
    student, teacher, given = torch.randn(4, 6, 3, 3), torch.randn(4, 8, 3, 3), draws((4, 8, 3, 3), torch.float32)
    gradients = []
    for model.checkpoint in (False, True):
        torch.manual_seed(1)
        losses = model(student, teacher, **given).losses
        gradients.append(torch.autograd.grad(sum(losses.values()), list(model.parameters()), allow_unused=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


@pytest.mark.parametrize(("network", "got"), [(nn.Conv2d(8, 6, 1), r"\(4, 6, 3, 3\)"), (nn.LSTM(3, 3), "tuple")])
def test_a_denoiser_that_predicts_something_else_is_refused(network, got):
    class Wrong(nn.Module):
        def forward(self, noisy, timesteps):
            return network(noisy) if isinstance(network, nn.Conv2d) else network(noisy[:, 0])

    model = DiffKD(6, 8, denoiser=lambda channels, is_map: Wrong())
    with pytest.raises(ValueError, match=rf"denoiser Wrong returned {got} for \(4, 8, 3, 3\); it must predict"):
        model(torch.randn(4, 6, 3, 3), torch.randn(4, 8, 3, 3))
    with pytest.raises(ValueError, match="no place for the denoiser Wrong"):
        to_official_state(model)
