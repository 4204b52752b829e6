"""The options of DiffKD beyond paper and code, each against a derivation of its own in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffkd import DiffKD, FeatureShape

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0).double()
SIZES = {"map": (3, 4), "vector": ()}
kinds = pytest.mark.parametrize("kind", SIZES)


def build(kind, **options):
    model = DiffKD(6, 8, kind=kind, **options).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def case(kind, channels=8, batch=5):
    size = SIZES[kind]
    student, teacher = torch.randn(batch, 6, *size).double(), 3 * torch.randn(batch, 8, *size).double() + 1
    noises = torch.randn(2, batch, channels, *size).double()
    return (
        student,
        teacher,
        {
            "noise": noises[0],
            "diffusion_noise": noises[1],
            "timesteps": torch.randint(1000, (batch,)),
        },
    )


def wide(x, like):
    return x.reshape(-1, *[1] * (like.ndim - 1))


def clean_and_noise(prediction, x, f, abar):
    """Solve z_t = s z_0 + n eps and the definition of what is predicted for z_0 and eps, as 2 x 2 linear equations."""
    s, n = abar.sqrt(), (1 - abar).sqrt()
    one, zero = torch.ones_like(s), torch.zeros_like(s)
    rows = {"noise": (zero, one), "clean": (one, zero), "velocity": (-n, s)}[prediction]
    matrix = torch.stack([torch.stack([s, n], -1), torch.stack(rows, -1)], -2)  # (..., 2, 2)
    inverse = torch.linalg.inv(matrix)
    solved = [inverse[..., i, 0] * x + inverse[..., i, 1] * f for i in range(2)]
    return solved[0], solved[1]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@kinds
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("start", [-1, 500, "gamma"])
@pytest.mark.parametrize("prediction", ["noise", "clean", "velocity"])
def test_prediction_start_and_every_step(kind, prediction, start, every_step):
    options = {"prediction": prediction, "start_timestep": start, "every_step": every_step, "inference_steps": 3}
    model = build(kind, **options)
    plain = copy.deepcopy(model)
    student, teacher, given = case(kind)
    result = model(student, teacher, **given)

    z = plain.student_projection(student)
    gamma = plain.noise_adapter(z)
    g = wide(gamma, z)
    x = g * z + (1 - g) * given["noise"]
    if start == "gamma":
        # Eq. 3 with the noise-to-signal ratio of Eq. 8.
        ratio = (1 - gamma) / gamma
        x = x / g / (1 + wide(ratio, z) ** 2).sqrt()
        first = torch.tensor([int(next(t for t in range(1000) if ABAR[t] <= 1 / (1 + r**2))) for r in ratio.tolist()])
        grid = [(first * k / 3 + 1e-9).round().long() for k in (3, 2, 1)]
    else:
        times = [500, 333, 167] if start == 500 else [332, 166, 0]
        grid = [torch.full((5,), t) for t in times]
    estimates = []
    for index, t in enumerate(grid):
        abar = wide(ABAR[t], x)
        clean, noise = clean_and_noise(prediction, x, plain.denoiser(x, t), abar)
        estimates.append(clean)
        before = wide(ABAR[grid[index + 1]], x) if index < 2 else torch.ones_like(abar)
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    compared = estimates if every_step else [x]
    projected = [plain.output_projection(one) for one in compared]
    close(result.denoised, projected[-1])
    close(result.losses["kd"], torch.stack([(one - teacher).square().mean() for one in projected]).mean())

    level = wide(ABAR[given["timesteps"]], teacher)
    noisy = level.sqrt() * teacher + (1 - level).sqrt() * given["diffusion_noise"]
    predicted = plain.denoiser(noisy, given["timesteps"])
    clean, noise = clean_and_noise(prediction, noisy, predicted, level)
    error = {
        "noise": noise - given["diffusion_noise"],
        "clean": clean - teacher,
        # An error of v is one of eps and z_0 at once: v = (eps - sqrt(1 - abar) z_t) / sqrt(abar).
        "velocity": (noise - given["diffusion_noise"]) / level.sqrt(),
    }[prediction]
    torch.testing.assert_close(result.losses["diffusion"], error.square().mean(), rtol=1e-7, atol=1e-9)
    for name, buffer in plain.named_buffers():
        close(model.get_buffer(name).double(), buffer.double())


@kinds
def test_the_prediction_of_a_perfect_network_recovers_the_clean_feature(kind):
    """Whatever is predicted: one step from a noisy feature with the true answer arrives at the clean one."""
    from diffkd.diffusion.schedule import ddim_scales, learned

    clean, noise = torch.randn(2, 5, 8, *SIZES[kind]).double()
    now, later = ABAR[torch.tensor([0, 10, 500, 700, 999])], ABAR[torch.tensor([0, 3, 200, 700, 0])]
    noisy = wide(now.sqrt(), clean) * clean + wide((1 - now).sqrt(), clean) * noise
    for prediction in ("noise", "clean", "velocity"):
        answer = learned(clean, noise, now, prediction)
        for level in (later, torch.ones_like(now)):
            a, b = ddim_scales(now, level, prediction)
            expected = wide(level.sqrt(), clean) * clean + wide((1 - level).sqrt(), clean) * noise
            close(wide(a, clean) * noisy + wide(b, clean) * answer, expected)


@kinds
@pytest.mark.parametrize("options", [{}, {"time": "film"}, {"denoiser_norm": True}], ids=str)
def test_a_flow_begins_with_the_students_feature(kind, options):
    model = DiffKD(6, 8, kind=kind, path="flow", inference_steps=2, **options).double()
    student, teacher, _ = case(kind)
    result = model(student, teacher)
    projected = model.student_projection(student)
    close(result.denoised, projected)
    close(result.losses["kd"], (projected - teacher).square().mean())
    result.losses["kd"].backward()
    last = [layer for layer in model.denoiser.pred if list(layer.parameters())][-1]
    assert all(parameter.grad.abs().sum() > 0 for parameter in last.parameters())  # it does not stay there


@kinds
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_flow(kind, n):
    model = build(kind, path="flow", inference_steps=n, ae_channels=4)
    assert isinstance(model.output_projection, nn.Identity)
    assert model.noise_adapter is None
    plain = copy.deepcopy(model)
    student, teacher, _ = case(kind)
    result = model(student, teacher)
    target = plain.autoencoder(teacher)[0].detach()
    source = plain.student_projection(student)
    z, losses = source, []
    for i in range(n, 0, -1):
        velocity = plain.denoiser(z, torch.full((5,), round(1000 * i / n) - 1))
        losses.append((source - velocity - target).square().mean())
        z = z - velocity / n
    close(result.denoised, z)
    close(result.losses["kd"], sum(losses) / n)
    assert sorted(result.losses) == ["kd", "reconstruction"]
    assert result.gamma is None
    sum(result.losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_number_of_steps_is_drawn_for_every_batch():
    model = build("vector", path="flow", inference_steps=[1, 2, 4, 8])
    calls = []
    model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    student, teacher, _ = case("vector")
    counts = []
    for _ in range(40):
        calls.clear()
        model(student, teacher)
        counts.append(len(calls))
    assert set(counts) == {1, 2, 4, 8}
    calls.clear()
    model.eval()(student, teacher)
    assert len(calls) == 8


@kinds
def test_time_by_scale_and_shift(kind):
    model = build(kind, time="film")
    network = copy.deepcopy(model.denoiser)
    assert not any("embedding" in name for name in model.state_dict())
    x, t = torch.randn(5, 8, *SIZES[kind]).double(), torch.tensor([0, 1, 400, 999, 3])
    half = [[math.sin(int(one) / 10_000 ** (k / 32)) for k in range(32)] for one in t]
    other = [[math.cos(int(one) / 10_000 ** (k / 32)) for k in range(32)] for one in t]
    waves = torch.cat([torch.tensor(half), torch.tensor(other)], dim=1).double()
    hidden = F.silu(waves @ network.time[0].weight.T + network.time[0].bias)
    numbers = hidden @ network.time[2].weight.T + network.time[2].bias
    parameters = {name: value.clone() for name, value in network.pred.state_dict().items()}

    def layer(name, x):
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2) if x.ndim == 4 else x @ weight.T + bias

    def norm(name, x):
        nonlocal numbers
        over = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        weight, bias = (parameters[f"{name}.{which}"].reshape(shape) for which in ("weight", "bias"))
        centred = x - x.mean(dim=over, keepdim=True)
        h = centred / (centred.square().mean(dim=over, keepdim=True) + 1e-5).sqrt() * weight + bias
        c = x.shape[1]
        scale, shift, numbers = numbers[:, :c], numbers[:, c : 2 * c], numbers[:, 2 * c :]
        return h * (1 + scale.reshape(5, c, *shape[2:])) + shift.reshape(5, c, *shape[2:])

    h = x
    if kind == "map":
        for b in ("0.block", "1.block"):
            inner = norm(f"{b}.1", layer(f"{b}.0", h)).relu()
            inner = norm(f"{b}.4", layer(f"{b}.3", inner)).relu()
            h = h + norm(f"{b}.7", layer(f"{b}.6", inner))
        h = norm("3", layer("2", h))
    else:
        h = norm("1", layer("0", h)).relu()
        h = norm("4", layer("3", h))
        h = norm("6", layer("5", h)).relu()
        h = layer("8", h)
    assert numbers.shape[1] == 0
    # The waves are float32 by design, of angles up to 999: 999 * 6e-8 is 6e-5.
    torch.testing.assert_close(model.denoiser(x, t), h, rtol=1e-3, atol=1e-3)


@kinds
def test_with_scale_and_shift_the_students_denoising_knows_the_time(kind):
    """A constant added to the input is taken out by batch normalisation; a scale and a shift after it are not."""
    for time, knows in (("embedding", False), ("film", True)):
        model = DiffKD(6, 8, kind=kind, time=time).double()
        if time == "film":
            nn.init.normal_(model.denoiser.time[-1].weight)
        x = torch.randn(16, 8, *SIZES[kind]).double()
        answers = [model.denoiser(x, torch.tensor([t])) for t in (0, 400)]
        difference = float((answers[0] - answers[1]).abs().max().detach())
        assert (difference > 1e-2) == knows
        assert knows or difference < 1e-4


def test_film_stays_when_the_normalisations_are_synchronised():
    film = DiffKD(6, 8, time="film").denoiser.eval()
    for parameter in film.time.parameters():
        nn.init.normal_(parameter)
    x, timesteps = torch.randn(2, 8, 3, 3), torch.tensor([400])
    expected = film(x, timesteps)
    assert torch.equal(nn.SyncBatchNorm.convert_sync_batchnorm(film)(x, timesteps), expected)


def test_a_denoiser_without_time_is_where_film_begins():
    torch.manual_seed(3)
    film = DiffKD(6, 8, time="film").denoiser
    x = torch.randn(5, 8, 3, 3)
    assert torch.equal(film(x, torch.tensor([5])), film(x, torch.tensor([900])))


@kinds
@pytest.mark.parametrize("ae", [None, 4])
def test_standardised_targets_do_not_depend_on_the_teachers_scale(kind, ae):
    model = build(kind, standardize=True, ae_channels=ae)
    twin = copy.deepcopy(model)
    student, teacher, given = case(kind, ae or 8)
    scales = wide(torch.logspace(0, 1.5, 8).double(), teacher.movedim(1, 0)).movedim(0, 1)
    first, second = model(student, teacher, **given), twin(student, teacher * scales + 7, **given)
    for term, loss in first.losses.items():
        close(second.losses[term], loss)
    over = [0, *range(2, teacher.ndim)]
    close(first.target.mean(dim=over), torch.zeros(ae or 8).double())
    close(first.target.var(dim=over, correction=0), torch.ones(ae or 8).double())


def test_standardised_logits_are_compared_as_logits():
    shape = FeatureShape(8, (), "logits")
    model = DiffKD(6, shape, standardize=True).double()
    student, teacher, given = case("vector")
    result = model(student, teacher, **given)
    assert torch.equal(result.target, teacher)
    mean, deviation = teacher.mean(dim=0), teacher.var(dim=0, correction=0).sqrt()
    inside = copy.deepcopy(model)
    inside.restores = False
    close(result.denoised, inside(student, teacher, **given).denoised * deviation + mean)
    expected = F.kl_div(result.denoised.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    close(result.losses["kd"], expected)


@kinds
@pytest.mark.parametrize("path", ["diffusion", "flow"])
def test_what_is_denoised_is_matched_too(kind, path):
    """With a weight of its own, beside the other losses, which do not change."""
    model = build(kind, path=path, inference_steps=2, source_weight=0.25, kd_weight=3.0)
    plain = copy.deepcopy(model)
    plain.weights["source"] = 0.0
    student, teacher, given = case(kind)
    result, without = model(student, teacher, **given), plain(student, teacher, **given)
    close(result.losses.pop("source"), 0.25 * (plain.student_projection(student) - teacher).square().mean())
    assert set(result.losses) == set(without.losses)
    for term, loss in without.losses.items():
        close(result.losses[term], loss)


def test_a_source_of_logits_is_compared_in_their_units():
    model = build("vector", path="flow", inference_steps=1, source_weight=1.0, standardize=True, distance="kl")
    student, teacher, _ = case("vector")
    loss = model(student, teacher).losses["source"]
    mean, deviation = teacher.mean(0), teacher.var(0, correction=0).sqrt()
    scores = model.student_projection(student) * deviation + mean
    close(loss, F.kl_div(scores.log_softmax(1), teacher.softmax(1), reduction="batchmean"))


def test_the_state_of_the_default_is_as_it_was():
    names = {name.split(".")[0] for name in DiffKD(6, 8, ae_channels=4).state_dict()}
    parts = {"student_projection", "autoencoder", "denoiser", "noise_adapter", "output_projection"}
    assert names == parts
    extra = {name.split(".")[0] for name in DiffKD(6, 8, ae_channels=4, standardize=True).state_dict()} - names
    assert extra == {"standardization", "latent_standardization"}


COMBINED = {
    "clean film every": {"time": "film", "prediction": "clean", "every_step": True, "standardize": True},
    "velocity gamma": {"prediction": "velocity", "start_timestep": "gamma", "standardize": True},
    "flow": {"path": "flow", "time": "film", "inference_steps": [1, 2], "standardize": True},
    "flow embedding": {"path": "flow", "inference_steps": 2, "source_weight": 1.0},
}
combined = pytest.mark.parametrize("options", COMBINED.values(), ids=COMBINED)
with_ae = pytest.mark.parametrize("ae", [None, 4])


@combined
@with_ae
@kinds
def test_recomputed_activations_give_the_same_bits(kind, ae, options):
    model = DiffKD(6, 8, kind=kind, ae_channels=ae, **options)
    twin = copy.deepcopy(model)
    twin.checkpoint = True
    student, teacher, given = case(kind, ae or 8)
    results = []
    for one in (model, twin):
        torch.manual_seed(1)
        losses = one(student.float(), teacher.float(), **{n: x.float() if x.ndim > 1 else x for n, x in given.items()})
        sum(losses.losses.values()).backward()
        results.append([*(p.grad for p in one.parameters()), *one.buffers()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*results, strict=True))


@combined
@with_ae
@kinds
def test_half_precision_stays_finite(kind, ae, options):
    student, teacher, _ = case(kind)
    for model in (DiffKD(6, 8, kind=kind, ae_channels=ae, **options), None):
        half = model is None
        model = DiffKD(6, 8, kind=kind, ae_channels=ae, **options).bfloat16() if half else model
        with torch.autocast("cpu", torch.bfloat16, enabled=not half):
            losses = model(student.bfloat16(), teacher.bfloat16()).losses
            total = sum(losses.values())
        assert total.dtype == torch.float32
        total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@combined
@kinds
def test_compiles_without_a_break_in_the_graph(kind, options):
    model = DiffKD(6, 8, kind=kind, ae_channels=4, **options).double()
    student, teacher, given = case(kind, 4)
    try:
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        for passes in (2, 1) if len(model.inference_steps) > 1 else (1,):
            if len(model.inference_steps) > 1:
                model.passes = compiled.passes = passes
                model.inference_steps = (passes,)
            expected = model(student, teacher, **given)
            result = compiled(student, teacher, **given)
            for term, loss in expected.losses.items():
                close(result.losses[term], loss)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "clock"}, "time must be one of 'embedding', 'film', got 'clock'"),
        ({"prediction": "score"}, "prediction must be one of 'noise', 'clean', 'velocity', got 'score'"),
        ({"path": "straight"}, "path must be one of 'diffusion', 'flow', got 'straight'"),
        ({"path": "flow", "prediction": "clean"}, "prediction='clean' has no meaning on path='flow'.*leave it out"),
        ({"path": "flow", "every_step": True}, "every_step=True has no meaning on path='flow'"),
        ({"path": "flow", "start_timestep": 500}, "start_timestep=500 has no meaning on path='flow'"),
        ({"path": "flow", "inference_steps": [1, 0]}, r"inference_steps must be in 1..1000 each, got \[1, 0\]"),
        ({"inference_steps": [1, 2]}, r"inference_steps=\[1, 2\] is drawn from on path='flow' alone"),
        ({"start_timestep": "gamma", "noise_adapter": False}, "start_timestep='gamma' .*noise adapter.*is off"),
        ({"time": "film", "denoiser": lambda c, m: nn.Identity()}, "time='film' is of the light denoiser"),
    ],
)
def test_combinations_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffKD(6, 8, **options)
