"""DiffKD written plainly: what the faster one in the package is measured against.

The structure of the published method, with none of the package's own: diffusers' scheduler steps the denoiser, logits
are 1x1 maps that go through 1x1 convolutions, and every pass computes its own gradients of the weights. The parameters
have the authors' names: :func:`diffkd.official.to_official_state` of a DiffKD fits, so that both can be compared.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd import FeatureShape
from diffkd.diffusion.distances import kl_divergence


class PlainDiffKD(nn.Module):
    """DiffKD for one pair, a method like any other for :class:`~diffkd.Distiller`.

    Args:
        student: shape of the student's feature.
        teacher: shape of the teacher's feature. With the role of logits, the distance is the KL divergence.
        ae_channels: width of the autoencoder, or None for none.
        inference_steps: number of denoising steps.

    Raises:
        ModuleNotFoundError: if diffusers is not installed.
    """

    def __init__(
        self, student: FeatureShape, teacher: FeatureShape, *, ae_channels: int | None = None, inference_steps: int = 5
    ) -> None:
        super().__init__()
        try:
            from diffusers import DDIMScheduler
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the plain transcription needs diffusers: uv run --group bench python -m benchmarks.step, or leave "
                "'plain' out of --contestants"
            ) from error
        latent = ae_channels or teacher.channels
        self.is_logits, self.inference_steps = teacher.role == "logits" and not teacher.is_map, inference_steps
        scheduler: Any = DDIMScheduler
        self.scheduler = scheduler(num_train_timesteps=1000, clip_sample=False, beta_schedule="linear")
        self.trans = nn.Conv2d(student.channels, latent, 1)
        self.model = _NoisePredictor(latent, self.is_logits)
        self.noise_adapter = _Adapter(latent, self.is_logits)
        self.proj = nn.Sequential(nn.Conv2d(latent, latent, 1), nn.BatchNorm2d(latent))
        if ae_channels is not None:
            self.ae = _Autoencoder(teacher.channels, latent)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        noise: Tensor | None = None,
        diffusion_noise: Tensor | None = None,
        timesteps: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses "kd", "diffusion" and, with an autoencoder, "reconstruction"."""
        if student.ndim == 2:
            student, teacher = student[..., None, None], teacher[..., None, None]
        losses = {}
        z = self.trans(student)
        target = teacher
        if hasattr(self, "ae"):
            latent, back = self.ae(teacher)
            losses["reconstruction"] = F.mse_loss(back, teacher)
            target = latent.detach()

        noise = torch.randn_like(z) if noise is None else noise.reshape(z.shape)
        gamma = self.noise_adapter(z)[:, None, None, None]
        x = gamma * z + (1 - gamma) * noise
        scheduler = self.scheduler
        scheduler.set_timesteps(2 * self.inference_steps)
        for t in scheduler.timesteps[self.inference_steps :].to(z.device):
            predicted = self.model(x, t[None])
            x = scheduler.step(predicted, t, x, eta=0.0, use_clipped_model_output=True)["prev_sample"]
        denoised = self.proj(x)

        diffusion_noise = torch.randn_like(target) if diffusion_noise is None else diffusion_noise.reshape(z.shape)
        if timesteps is None:
            timesteps = torch.randint(0, 1000, target.shape[:1], device=target.device)
        noisy = scheduler.add_noise(target, diffusion_noise, timesteps)
        losses["diffusion"] = F.mse_loss(self.model(noisy, timesteps), diffusion_noise)
        losses["kd"] = kl_divergence(denoised, target) if self.is_logits else F.mse_loss(denoised, target)
        return losses


def _bottleneck(channels: int, reduction: int) -> nn.Sequential:
    inner = channels // reduction
    return nn.Sequential(
        *(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
        *(nn.Conv2d(inner, inner, 3, padding=1), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
        *(nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels)),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.block = _bottleneck(channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = x + self.block(x)
        return total


class _NoisePredictor(nn.Module):
    def __init__(self, channels: int, is_logits: bool) -> None:
        super().__init__()
        self.time_embedding = nn.Embedding(1280, channels)
        if is_logits:
            wide = 4 * channels
            self.pred = nn.Sequential(
                *(nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)),
                *(nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels)),
                *(nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)),
                nn.Conv2d(wide, channels, 1),
            )
        else:
            self.pred = nn.Sequential(
                _Residual(channels, 4),
                _Residual(channels, 4),
                nn.Conv2d(channels, channels, 1),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        prediction: Tensor = self.pred(x + self.time_embedding(timesteps)[..., None, None])
        return prediction


class _Adapter(nn.Module):
    def __init__(self, channels: int, is_logits: bool) -> None:
        super().__init__()
        self.feat = (
            nn.Sequential(
                *(nn.Conv2d(channels, 2 * channels, 1), nn.BatchNorm2d(2 * channels), nn.ReLU(inplace=True)),
                *(nn.Conv2d(2 * channels, channels, 1), nn.BatchNorm2d(channels)),
            )
            if is_logits
            else nn.Sequential(_Residual(channels, 8), nn.AdaptiveAvgPool2d(1))
        )
        self.pred = nn.Linear(channels, 2)

    def forward(self, z: Tensor) -> Tensor:
        scores: Tensor = self.pred(self.feat(z).flatten(1))
        return scores.softmax(dim=1)[:, 0]


class _Autoencoder(nn.Module):
    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(channels, latent, 1), nn.BatchNorm2d(latent))
        self.decoder = nn.Sequential(nn.Conv2d(latent, channels, 1))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.encoder(feature)
        return latent, self.decoder(latent)
