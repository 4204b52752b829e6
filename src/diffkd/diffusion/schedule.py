"""The diffusion process as pure functions: noise schedule, forward noising, and deterministic DDIM.

Notation of the DiffKD paper: `z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps` (Eq. 3), reversed by DDIM with eta = 0
(Eq. 5; Song, Meng, Ermon, *Denoising Diffusion Implicit Models*, ICLR 2021, Eq. 12).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear", "cosine"]
Prediction = Literal["noise", "clean", "velocity"]


class DDIMStep(NamedTuple):
    """One reverse step `x <- x_scale * x + noise_scale * eps(x, timestep)`, folded into two coefficients.

    For a network that predicts something other than the noise, `noise_scale` is the factor of its prediction.
    """

    timestep: int
    x_scale: float
    noise_scale: float


def alphas_cumprod(num_train_timesteps: int = 1000, schedule: BetaSchedule = "linear") -> Tensor:
    """Return abar_t, the share of signal power left at each timestep.

    Args:
        num_train_timesteps: number of timesteps T.
        schedule: "linear" (betas from 1e-4 to 0.02; Ho et al. 2020 and the DiffKD paper), "scaled_linear" (linear in
            sqrt(beta); Rombach et al. 2022) or "cosine" (Nichol and Dhariwal 2021, betas capped at 0.999).

    Returns:
        (T,) float32, strictly decreasing. Computed in float32, like the authors' table.

    Raises:
        ValueError: if `num_train_timesteps` is not positive or the schedule is unknown.
    """
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, num_train_timesteps, dtype=torch.float32)
    elif schedule == "scaled_linear":
        betas = torch.linspace(1e-4**0.5, 0.02**0.5, num_train_timesteps, dtype=torch.float32).square()
    elif schedule == "cosine":
        grid = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        signal = torch.cos((grid + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999).float()
    else:
        raise ValueError(f"unknown schedule {schedule!r}; choose 'linear', 'scaled_linear' or 'cosine'")
    return torch.cumprod(1.0 - betas, dim=0)


def ddim_steps(
    abar: Tensor, inference_steps: int, start_timestep: int | None = None, prediction: Prediction = "noise"
) -> tuple[DDIMStep, ...]:
    """Plan the reverse process: which timesteps are visited, and each step's two coefficients.

    With `start_timestep=None` the timesteps are the authors' code's: the last `n` of `2n` evenly spaced ones, so that
    5 steps of 1000 visit 400, 300, 200, 100, 0 and a single step visits only 0. With a number they are the paper's
    (App. B.1): `n` steps evenly spaced from `start_timestep` down to, but without, the clean feature, so that 5 steps
    from 500 visit 500, 400, 300, 200, 100.

    Args:
        abar: (T,) as from :func:`alphas_cumprod`.
        inference_steps: number of denoiser evaluations n (NFE).
        start_timestep: first timestep in 1..T-1, or None.
        prediction: what the network predicts.

    Returns:
        n steps, in their order. The last gives the clean feature (abar = 1).

    Raises:
        ValueError: if there are more steps than timesteps to visit, or `start_timestep` lies outside 1..T-1.
    """
    total = len(abar)
    if start_timestep is None:
        if not 1 <= inference_steps <= total // 2:
            raise ValueError(f"inference_steps must be in 1..{total // 2} for {total} timesteps, got {inference_steps}")
        stride = total // (2 * inference_steps)
        timesteps = [k * stride for k in reversed(range(inference_steps))]
        previous = [t - stride for t in timesteps]
        clean_from = -1  # timestep 0 still has noise: the clean feature comes after it
    else:
        if not 1 <= start_timestep < total:
            raise ValueError(f"start_timestep must be in 1..{total - 1} for {total} timesteps, got {start_timestep}")
        if not 1 <= inference_steps <= start_timestep:
            raise ValueError(
                f"inference_steps must be in 1..{start_timestep} from timestep {start_timestep}, got {inference_steps}"
            )
        grid = [round(start_timestep * k / inference_steps) for k in reversed(range(inference_steps + 1))]
        timesteps, previous = grid[:-1], grid[1:]
        clean_from = 0
    levels = abar.double().tolist()
    return tuple(
        DDIMStep(t, *ddim_coefficients(levels[t], levels[before] if before > clean_from else 1.0, prediction))
        for t, before in zip(timesteps, previous, strict=True)
    )


def ddim_coefficients(abar_t: float, abar_previous: float, prediction: Prediction = "noise") -> tuple[float, float]:
    """Fold one deterministic DDIM step into `x_previous = x_scale * x_t + noise_scale * eps`.

    Args:
        abar_t: signal power at the current timestep, in (0, 1).
        abar_previous: signal power to arrive at, in (0, 1].
        prediction: what the network predicts; `noise_scale` is then its factor.

    Returns:
        `(x_scale, noise_scale)`.
    """
    if prediction != "noise":
        level = torch.tensor(abar_t, dtype=torch.float64)
        scales = ddim_scales(level, torch.tensor(abar_previous, dtype=torch.float64), prediction)
        return scales[0].item(), scales[1].item()
    x_scale = math.sqrt(abar_previous / abar_t)
    return x_scale, math.sqrt(1 - abar_previous) - x_scale * math.sqrt(1 - abar_t)


def ddim_denoise(denoiser: Callable[[Tensor, int], Tensor], x: Tensor, steps: Sequence[DDIMStep]) -> Tensor:
    """Run the reverse process on `x` (Eq. 5 with eta = 0).

    Args:
        denoiser: predicts the noise from `(x, timestep)`.
        x: (B, C, ...) the noisy feature, float32 or float64: the loop keeps this dtype.
        steps: as from :func:`ddim_steps`.

    Returns:
        The denoised feature, shape and type of `x`.
    """
    for step in steps:
        noise = denoiser(x, step.timestep).to(x.dtype)
        x = (step.x_scale * x).add_(noise, alpha=step.noise_scale)
    return x


def clean_scales(abar: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Return `(x_scale, scale)` of the estimate `z_0 = x_scale * z_t + scale * f` from a network's prediction f.

    | prediction | f             | z_0                                  |
    | ---------- | ------------- | ------------------------------------ |
    | noise      | eps           | (z_t - sqrt(1 - abar) f) / sqrt(abar) |
    | clean      | z_0           | f                                    |
    | velocity   | :func:`learned` | sqrt(abar) z_t - sqrt(1 - abar) f  |

    Salimans and Ho, *Progressive Distillation for Fast Sampling of Diffusion Models*, ICLR 2022, Sec. 4 and App. D.

    Args:
        abar: signal power of any shape, in (0, 1).
        prediction: what f is.

    Returns:
        Two tensors of that shape.
    """
    signal, noise = abar.sqrt(), (1 - abar).sqrt()
    if prediction == "noise":
        return 1 / signal, -noise / signal
    return (signal, -noise) if prediction == "velocity" else (torch.zeros_like(abar), torch.ones_like(abar))


def ddim_scales(abar: Tensor, previous: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Fold a DDIM step into `z_previous = x_scale * z_t + scale * f`, as :func:`ddim_coefficients` does for tensors.

    With the estimate z_0 of :func:`clean_scales`, eps = (z_t - sqrt(abar) z_0) / sqrt(1 - abar), and
    z_previous = sqrt(previous) z_0 + sqrt(1 - previous) eps (Eq. 5).

    Args:
        abar: signal power now, in (0, 1).
        previous: signal power to arrive at, in (0, 1]; where it is `abar`, nothing changes.
        prediction: what the network predicts.

    Returns:
        Two tensors of their shape.
    """
    kept = ((1 - previous) / (1 - abar)).sqrt()  # of the noise
    x_scale, scale = clean_scales(abar, prediction)
    added = previous.sqrt() - abar.sqrt() * kept
    return kept + added * x_scale, added * scale


def learned(clean: Tensor, noise: Tensor, abar: Tensor, prediction: Prediction) -> Tensor:
    """Return the training target of a network with that prediction, for the noisy z_t of :func:`add_noise`.

    The noise eps (Eq. 4), the clean z_0, or the velocity sqrt(abar) eps - sqrt(1 - abar) z_0 (Salimans and Ho, 2022).

    Args:
        clean: (B, C, ...) z_0.
        noise: eps, same shape.
        abar: (B,) signal power of each sample's timestep.
        prediction: which of the three.
    """
    if prediction == "noise":
        return noise
    if prediction == "clean":
        return clean
    abar = abar.reshape(-1, *[1] * (clean.ndim - 1))
    return abar.sqrt() * noise - (1 - abar).sqrt() * clean


def timesteps_of_level(abar: Tensor, gamma: Tensor, inference_steps: int) -> Tensor:
    """Plan the reverse process of `gamma z + (1 - gamma) eps` (Eq. 8) from the timestep of the same noise level.

    The ratio of noise to signal is (1 - gamma) : gamma, so abar = gamma^2 / (gamma^2 + (1 - gamma)^2); the first
    timestep with no more signal than that is where a sample starts. From there the steps are spaced evenly down to 0.

    Args:
        abar: (T,) as from :func:`alphas_cumprod`.
        gamma: (B,) in (0, 1).
        inference_steps: n.

    Returns:
        (n, B) int64 timesteps in 0..T-1, falling or staying from one row to the next.
    """
    wanted = gamma.detach().square() / (gamma.detach().square() + (1 - gamma.detach()).square())
    start = torch.searchsorted(-abar, -wanted.to(abar.dtype).contiguous()).clamp(max=len(abar) - 1)
    left = torch.arange(inference_steps, 0, -1, device=start.device)[:, None]
    return (2 * start * left + inference_steps) // (2 * inference_steps)  # rounded


def add_noise(clean: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """Noise a clean feature to the level of its timestep: `sqrt(abar) z_0 + sqrt(1 - abar) eps` (Eq. 3).

    Args:
        clean: (B, C, ...) z_0.
        noise: eps, same shape.
        abar: (B,) signal power of each sample's timestep.

    Returns:
        z_t, same shape as `clean`, in the wider of the three types.
    """
    abar = abar.reshape(-1, *[1] * (clean.ndim - 1))
    return abar.sqrt() * clean + (1 - abar).sqrt() * noise
