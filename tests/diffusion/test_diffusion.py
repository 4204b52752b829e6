import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import units_of

from diffkd.diffusion.schedule import DDIMStep, add_noise, alphas_cumprod, ddim_coefficients, ddim_denoise, ddim_steps

ABAR = alphas_cumprod()

# Measured on the authors' code: five steps of a thousand, and what they add up to. Their table is float32 as ours is,
# and how torch.linspace rounds is up to the processor. If all 400 factors of a signal's share are each wrong by a
# rounding, the share is wrong by 400, its root by 200, and no coefficient by more.
TABLE = units_of(torch.float32, 200)
FIVE_STEPS = [
    (400, 1.426700948, -0.502743601),
    (300, 1.290662166, -0.418500546),
    (200, 1.167828443, -0.360784635),
    (100, 1.056896520, -0.332242168),
    (0, 1.000050012, -0.010001330),
]


def test_five_steps_are_the_authors():
    steps = ddim_steps(ABAR, 5)
    assert [step.timestep for step in steps] == [timestep for timestep, *_ in FIVE_STEPS]
    for step, (_, x_scale, noise_scale) in zip(steps, FIVE_STEPS, strict=True):
        assert step.x_scale == pytest.approx(x_scale, abs=TABLE)
        assert step.noise_scale == pytest.approx(noise_scale, abs=TABLE)
    assert float(ABAR[400]) == pytest.approx(0.193572, rel=2 * TABLE)
    assert math.prod(step.x_scale for step in steps) == pytest.approx(2.272892, rel=TABLE)


@pytest.mark.parametrize(
    ("inference_steps", "timesteps"),
    [
        (1, [0]),
        (2, [250, 0]),
        (3, [332, 166, 0]),
        (4, [375, 250, 125, 0]),
        (10, list(range(450, -1, -50))),
        (20, list(range(475, -1, -25))),
    ],
)
def test_timesteps_for_other_step_counts(inference_steps, timesteps):
    assert [step.timestep for step in ddim_steps(ABAR, inference_steps)] == timesteps


def test_a_single_step_of_the_authors_is_nearly_the_identity():
    (step,) = ddim_steps(ABAR, 1)
    assert step == pytest.approx(DDIMStep(0, 1.00005, -0.0100013), abs=1e-6)


@pytest.mark.parametrize(
    ("start", "inference_steps", "timesteps"),
    [(500, 5, [500, 400, 300, 200, 100]), (500, 1, [500]), (999, 3, [999, 666, 333]), (7, 7, [7, 6, 5, 4, 3, 2, 1])],
)
def test_paper_timesteps_start_where_told(start, inference_steps, timesteps):
    steps = ddim_steps(ABAR, inference_steps, start)
    assert [step.timestep for step in steps] == timesteps


@given(
    total=st.integers(2, 1500),
    inference_steps=st.integers(1, 40),
    start=st.one_of(st.none(), st.integers(1, 1499)),
)
def test_a_perfect_denoiser_arrives_at_the_clean_feature(total, inference_steps, start):
    """DDIM inverts the forward process exactly, if the noise is known: for every plan of timesteps."""
    abar = alphas_cumprod(total)
    if start is None and inference_steps > total // 2:
        inference_steps = total // 2
    if start is not None:
        start = min(start, total - 1)
        inference_steps = min(inference_steps, start)
    steps = ddim_steps(abar, inference_steps, start)
    assert len(steps) == inference_steps
    timesteps = [step.timestep for step in steps]
    assert timesteps == sorted(set(timesteps), reverse=True)
    clean, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    noisy = add_noise(clean, noise, abar.double()[[timesteps[0]] * 2])
    torch.testing.assert_close(ddim_denoise(lambda x, t: noise, noisy, steps), clean, rtol=1e-8, atol=1e-8)


@given(st.floats(1e-6, 1 - 1e-6), st.floats(1e-6, 1.0))
def test_folded_coefficients_equal_the_two_step_formula(abar_t, abar_previous):
    x_scale, noise_scale = ddim_coefficients(abar_t, abar_previous)
    x, eps = 0.7, -1.3
    clean = (x - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
    expected = math.sqrt(abar_previous) * clean + math.sqrt(1 - abar_previous) * eps
    assert x_scale * x + noise_scale * eps == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 50, 1000])
def test_schedules_fall_and_stay_within_zero_and_one(schedule, total):
    abar = alphas_cumprod(total, schedule)
    assert abar.shape == (total,)
    assert abar.dtype == torch.float32
    assert abar[-1] > 0
    assert abar[0] < 1
    assert (abar.diff() < 0).all()


def test_schedules_follow_their_formulas():
    assert torch.allclose(1 - ABAR[1] / ABAR[0], torch.tensor(1e-4 + 0.0199 / 999), rtol=1e-3)
    assert float(ABAR.double()[-1]) == pytest.approx(4.0358e-5, rel=1e-4)  # Ho et al. 2020
    scaled = alphas_cumprod(1000, "scaled_linear")
    assert float(1 - scaled[0]) == pytest.approx(1e-4, rel=1e-3)
    cosine = alphas_cumprod(1000, "cosine").double()

    def signal(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 250, 500, 900):
        assert float(cosine[t]) == pytest.approx(signal(t + 1) / signal(0), rel=1e-4)


def test_noise_levels_are_per_sample():
    clean, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    noisy = add_noise(clean, noise, torch.tensor([1.0, 0.0, 0.36]))
    torch.testing.assert_close(noisy[0], clean[0])
    torch.testing.assert_close(noisy[1], noise[1])
    torch.testing.assert_close(noisy[2], 0.6 * clean[2] + 0.8 * noise[2])


def test_the_loop_keeps_its_precision_under_a_half_denoiser():
    x = torch.randn(2, 3)
    denoised = ddim_denoise(lambda x, t: torch.ones_like(x, dtype=torch.bfloat16), x, ddim_steps(ABAR, 5))
    assert denoised.dtype == torch.float32
    expected = ddim_denoise(lambda x, t: torch.ones_like(x), x, ddim_steps(ABAR, 5))
    assert torch.equal(denoised, expected)


def test_the_denoiser_is_told_the_time():
    seen = []

    def denoiser(x, t):
        seen.append(t)
        return x

    ddim_denoise(denoiser, torch.zeros(4, 2), ddim_steps(ABAR, 3))
    assert seen == [332, 166, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alphas_cumprod(0), "at least 1, got 0"),
        (lambda: alphas_cumprod(10, "quadratic"), "unknown schedule 'quadratic'"),
        (lambda: ddim_steps(ABAR, 0), "1..500 for 1000 timesteps, got 0"),
        (lambda: ddim_steps(ABAR, 501), "1..500 for 1000 timesteps, got 501"),
        (lambda: ddim_steps(ABAR, 5, 1000), "1..999 for 1000 timesteps, got 1000"),
        (lambda: ddim_steps(ABAR, 5, 0), "1..999 for 1000 timesteps, got 0"),
        (lambda: ddim_steps(ABAR, 5, 4), "1..4 from timestep 4, got 5"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
