"""DiffKD written out a second time: plain functions on a flat dict of parameters under the authors' names.

Shares no code with the package; computes what the authors' code does, or what the paper's text says. Everything is a
1x1 or 3x3 convolution on maps, batch normalisation is spelled out, and each DDIM step goes through the estimate of the
clean feature. Vectors come as (B, C, 1, 1).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Parameters:
    """Parameters and buffers by name; `updated` receives the buffers as training leaves them."""

    values: dict[str, Tensor]
    training: bool
    paper: bool = False
    updated: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        self.updated = {name: value.clone() for name, value in self.values.items() if name.endswith(buffers)}


def conv(p: Parameters, name: str, x: Tensor, padding: int = 0) -> Tensor:
    return F.conv2d(x, p.values[f"{name}.weight"], p.values[f"{name}.bias"], padding=padding)


def norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    mean, var = p.updated[f"{name}.running_mean"], p.updated[f"{name}.running_var"]
    if p.training:
        count = x.numel() // x.shape[1]
        mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
        for buffer, batch in (("running_mean", mean), ("running_var", var * count / (count - 1))):
            p.updated[f"{name}.{buffer}"] = 0.9 * p.updated[f"{name}.{buffer}"] + 0.1 * batch.detach()
        p.updated[f"{name}.num_batches_tracked"] += 1
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return x * p.values[f"{name}.weight"][:, None, None] + p.values[f"{name}.bias"][:, None, None]


def bottleneck(p: Parameters, name: str, x: Tensor) -> Tensor:
    h = F.relu(norm(p, f"{name}.block.1", conv(p, f"{name}.block.0", x)))
    h = F.relu(norm(p, f"{name}.block.4", conv(p, f"{name}.block.3", h, padding=1)))
    total = x + norm(p, f"{name}.block.7", conv(p, f"{name}.block.6", h))
    return F.relu(total) if p.paper else total


def predict_noise(p: Parameters, x: Tensor, timesteps: Tensor, is_map: bool) -> Tensor:
    x = x + p.values["model.time_embedding.weight"][timesteps][..., None, None]
    if is_map:
        x = bottleneck(p, "model.pred.1", bottleneck(p, "model.pred.0", x))
        x = conv(p, "model.pred.2", x)
        return x if p.paper else norm(p, "model.pred.3", x)
    x = F.relu(norm(p, "model.pred.1", conv(p, "model.pred.0", x)))
    x = norm(p, "model.pred.4", conv(p, "model.pred.3", x))
    x = F.relu(norm(p, "model.pred.6", conv(p, "model.pred.5", x)))
    return conv(p, "model.pred.8", x)


def match_noise(p: Parameters, x: Tensor, is_map: bool) -> Tensor:
    if is_map:
        x = bottleneck(p, "noise_adapter.feat.0", x).mean(dim=(2, 3))
    else:
        x = F.relu(norm(p, "noise_adapter.feat.1", conv(p, "noise_adapter.feat.0", x)))
        x = norm(p, "noise_adapter.feat.4", conv(p, "noise_adapter.feat.3", x)).flatten(1)
    scores = x @ p.values["noise_adapter.pred.weight"].T + p.values["noise_adapter.pred.bias"]
    return torch.sigmoid(scores[:, 0] - scores[:, 1])


def plain_diffkd(
    p: Parameters,
    student: Tensor,
    teacher: Tensor,
    noise: Tensor,
    diffusion_noise: Tensor,
    timesteps: Tensor,
    *,
    is_map: bool,
    steps: int = 5,
) -> dict[str, Tensor]:
    """Return denoised, target, gamma and the losses kd (mean squared error), diffusion, and reconstruction with AE."""
    # The authors' table is float32; what is computed from it is not.
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0).to(student.dtype)
    results = {}

    def squared_error(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean()

    z = conv(p, "trans", student)
    target = teacher.detach() if p.paper else teacher
    if "ae.encoder.0.weight" in p.values:
        latent = conv(p, "ae.encoder.0", teacher)
        latent = latent if p.paper else norm(p, "ae.encoder.1", latent)
        results["reconstruction"] = squared_error(conv(p, "ae.decoder.0", latent), teacher)
        target = latent.detach()

    gamma = match_noise(p, z, is_map)
    x = gamma[:, None, None, None] * z + (1 - gamma[:, None, None, None]) * noise
    stride = 500 // steps
    # The text goes down from 500 and arrives at the clean feature at 0; the code is a stride late, and arrives beyond.
    visited = [500 - k * stride for k in range(steps)] if p.paper else [k * stride for k in range(steps)[::-1]]
    for timestep in visited:
        now, earlier = abar[timestep], timestep - stride
        before = abar[earlier] if earlier > (0 if p.paper else -1) else torch.ones_like(now)
        eps = predict_noise(p, x, torch.tensor([timestep]), is_map)
        clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * eps
    denoised = x if p.paper else norm(p, "proj.1", conv(p, "proj.0", x))

    level = abar[timesteps][:, None, None, None]
    noisy = level.sqrt() * target + (1 - level).sqrt() * diffusion_noise
    eps = predict_noise(p, noisy, timesteps, is_map)
    results["diffusion"] = squared_error(eps, diffusion_noise)
    results["kd"] = (denoised - target).square().mean()
    return results | {"denoised": denoised, "target": target, "gamma": gamma}
