"""The trainable parts of DiffKD: denoiser, noise adapter and linear autoencoder, for maps and for vectors.

Maps are (B, C, H, W) and go through convolutions; vectors (logits, regression outputs) are (B, C) and go through matrix
products. The parameters keep the order and shapes of the authors' modules, so that their checkpoints fit
(:mod:`diffkd.official`).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of (B, C) and (B, C, H, W) that allows a single value per channel.

    With one value per channel (a batch of one vector, a 1x1 map of one image) batch statistics do not exist; the
    running statistics are then used, and not updated.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in (2, 4):
            raise ValueError(f"expected (B, C) or (B, C, H, W), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` over all but dimension 1."""
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, computed as a matrix product for channels_last inputs on a CPU, where that is faster.

    There, (B, C, H, W) is stored as the rows (B * H * W, C); a convolution would reorder the weight in every call.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W), layout kept."""
        # The compiler plans memory formats itself, and assumes other strides for the gradients of the rows.
        rows = not torch.compiler.is_compiling() and input.is_cpu
        if rows and input.is_contiguous(memory_format=torch.channels_last):
            return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return super().forward(input)


def pointwise(in_channels: int, out_channels: int, is_map: bool) -> nn.Module:
    """Return a linear map over channels: a 1x1 convolution for maps, a matrix product for vectors."""
    return PointwiseConv(in_channels, out_channels) if is_map else nn.Linear(in_channels, out_channels)


class Bottleneck(nn.Module):
    """A residual bottleneck, (B, C, H, W) to the same shape: 1x1 to C / reduction, 3x3, 1x1 back to C.

    Args:
        channels: C.
        reduction: factor by which the inner convolutions have fewer channels.
        activate: apply ReLU after the sum, as in ResNet. The authors' code does not.
    """

    def __init__(self, channels: int, reduction: int = 4, activate: bool = False) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.block = nn.Sequential(
            PointwiseConv(channels, inner),
            BatchNorm(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, padding=1),
            BatchNorm(inner),
            nn.ReLU(inplace=True),
            PointwiseConv(inner, channels),
            BatchNorm(channels),
        )
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` plus its bottleneck."""
        x = self.block(x).add_(x)  # in place: autograd does not save the output of batch normalisation
        return F.relu(x) if self.activate else x


class Denoiser(nn.Module):
    """Phi(z_t, t), which predicts the noise in a noisy latent (Fig. 3 of the paper).

    For maps: two bottlenecks and a 1x1 convolution. For vectors, each bottleneck becomes two linear layers (App. B.2).
    A learned embedding of the timestep is added to the input.

    Args:
        channels: C of the latent.
        is_map: (B, C, H, W) if true, (B, C) otherwise.
        num_train_timesteps: number of timesteps T.
        output_norm: end in a batch normalisation (maps only), as in the authors' code but not in the paper's Fig. 3.
        activate: ReLU after the bottlenecks' sums (maps only).
    """

    def __init__(
        self,
        channels: int,
        is_map: bool = True,
        num_train_timesteps: int = 1000,
        output_norm: bool = True,
        activate: bool = False,
    ) -> None:
        super().__init__()
        # The authors' table has 1280 rows, of which 1000 are used; the same size lets their weights load.
        self.time_embedding = nn.Embedding(max(1280, num_train_timesteps), channels)
        self.pred = _denoiser_layers(channels, is_map, output_norm, activate)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, linears: Sequence[Callable[[Tensor], Tensor]] = (), batches: int = 1
    ) -> Tensor:
        """Predict the noise in `noisy`.

        Args:
            noisy: (B, C, H, W) or (B, C), z_t.
            timesteps: (B,) or (1,) int64 in 0..T-1; or their embeddings, (B, C) or (1, C).
            linears: callables that replace the linear layers, in their order (see :mod:`diffkd.diffusion.passes`);
                empty: the layers themselves.
            batches: number of concatenated batches of equal size in `noisy`, each with its own batch statistics
                (vectors only).

        Returns:
            The predicted noise, same shape.
        """
        time = timesteps if timesteps.is_floating_point() else self.time_embedding(timesteps)  # (B, C)
        time = time.reshape(*time.shape, *[1] * (noisy.ndim - 2))
        x: Tensor = noisy.to(time.dtype) + time
        instead = list(linears)
        for layer in self.pred:
            if batches > 1 and isinstance(layer, nn.modules.batchnorm._BatchNorm):
                x = torch.cat([layer(one) for one in x.chunk(batches)])
                continue
            run = instead.pop(0) if instead and isinstance(layer, nn.Linear) else layer
            x = run(x)
        return x


def begin_at_zero(denoiser: nn.Module) -> None:
    """Set the last layer of a light denoiser to zero, so that it predicts zeros until it is trained."""
    last = [layer for layer in denoiser.get_submodule("pred").children() if list(layer.parameters())][-1]
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


def _denoiser_layers(channels: int, is_map: bool, output_norm: bool, activate: bool) -> nn.Sequential:
    if is_map:
        return nn.Sequential(
            Bottleneck(channels, activate=activate),
            Bottleneck(channels, activate=activate),
            PointwiseConv(channels, channels),
            BatchNorm(channels) if output_norm else nn.Identity(),
        )
    return nn.Sequential(
        *(nn.Linear(channels, 4 * channels), BatchNorm(4 * channels), nn.ReLU(inplace=True)),
        *(nn.Linear(4 * channels, channels), BatchNorm(channels)),
        *(nn.Linear(channels, 4 * channels), BatchNorm(4 * channels), nn.ReLU(inplace=True)),
        nn.Linear(4 * channels, channels),
    )


def sinusoids(timesteps: Tensor, width: int) -> Tensor:
    """Return the sinusoidal embedding of timesteps: (B,) to (B, width), float32.

    Sines and cosines of t / 10000^(k / h) for k = 0..h - 1, h = `width` / 2 (Vaswani et al., *Attention Is All You
    Need*, NIPS 2017, Sec. 3.5, as Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models*, NeurIPS 2020, use it).
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10_000) / half))
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class FilmDenoiser(nn.Module):
    """The light :class:`Denoiser`, conditioned on the timestep by a scale and shift after every batch normalisation.

    After the k-th normalisation, h becomes (1 + a_k(t)) h + b_k(t), per channel, with (a, b) from a small network on
    the :func:`sinusoids` of t (Perez et al., *FiLM*, AAAI 2018, Eq. 2; Dhariwal and Nichol, *Diffusion Models Beat
    GANs on Image Synthesis*, NeurIPS 2021, Sec. 3.1). Its last layer is initialised to zero, so that the timestep has
    no effect at first. The embedding that :class:`Denoiser` adds to the input is constant over the batch in the
    student's denoising, so that batch normalisation removes it; scale and shift after normalisation remain.

    Args:
        channels: C of the latent.
        is_map: (B, C, H, W) if true, (B, C) otherwise.
        output_norm: end in a batch normalisation (maps only).
        activate: ReLU after the bottlenecks' sums (maps only).
        width: of the embedding.
    """

    def __init__(
        self,
        channels: int,
        is_map: bool = True,
        output_norm: bool = True,
        activate: bool = False,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.pred = _denoiser_layers(channels, is_map, output_norm, activate)
        self.width = width
        self.sizes = [2 * norm.num_features for norm in self.pred.modules() if isinstance(norm, BatchNorm)]
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, sum(self.sizes)))
        last = self.time[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the prediction for (B, C, H, W) or (B, C) and timesteps, (B,) or (1,) int64; same shape."""
        dtype = self.time.get_parameter("0.weight").dtype
        every = self.time(sinusoids(timesteps, self.width).to(dtype))  # (B, sum of sizes)
        films = iter(every.reshape(*every.shape, *[1] * (noisy.ndim - 2)).split(self.sizes, dim=1))
        x = noisy.to(dtype)
        for layer in self.pred:
            if isinstance(layer, Bottleneck):
                x = _filmed(layer.block, x, films) + x
                x = F.relu(x) if layer.activate else x
            else:
                x = _filmed([layer], x, films)
        return x


def _filmed(layers: nn.Sequential | Sequence[nn.Module], x: Tensor, films: Iterator[Tensor]) -> Tensor:
    """Run layers in sequence, with the next scale and shift after each batch normalisation."""
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm takes the place of ours
            scale, shift = next(films).chunk(2, dim=1)
            x = x * (1 + scale) + shift
    return x


class NoiseAdapter(nn.Module):
    """Adaptive noise matching: one gamma in (0, 1) per sample, from the projected student feature (Eq. 8).

    Args:
        channels: C of the latent.
        is_map: (B, C, H, W) if true, (B, C) otherwise.
        activate: ReLU after the bottleneck's sum (maps only).
    """

    def __init__(self, channels: int, is_map: bool = True, activate: bool = False) -> None:
        super().__init__()
        self.feat = (
            nn.Sequential(Bottleneck(channels, reduction=8, activate=activate), nn.AdaptiveAvgPool2d(1))
            if is_map
            else nn.Sequential(
                *(nn.Linear(channels, 2 * channels), BatchNorm(2 * channels), nn.ReLU(inplace=True)),
                *(nn.Linear(2 * channels, channels), BatchNorm(channels)),
            )
        )
        self.pred = nn.Linear(channels, 2)

    def forward(self, latent: Tensor) -> Tensor:
        """Return gamma, (B,) in float32 or wider, for (B, C, H, W) or (B, C). Larger means less added noise."""
        scores = self.pred(self.feat(latent).flatten(1))
        return at_least_float32(scores).softmax(dim=1)[:, 0]


class LinearAutoencoder(nn.Module):
    """Linear autoencoder that narrows the teacher's feature to the latent (Sec. 3.2), trained by Eq. 6 alone.

    Args:
        channels: channels of the teacher's feature.
        latent_channels: C of the latent.
        is_map: (B, C, H, W) if true, (B, C) otherwise.
        norm: end the encoder in a batch normalisation, as in the authors' code; the paper has two convolutions only.
    """

    def __init__(self, channels: int, latent_channels: int, is_map: bool = True, norm: bool = True) -> None:
        super().__init__()
        layers = [pointwise(channels, latent_channels, is_map)]
        self.encoder = nn.Sequential(*layers, *([BatchNorm(latent_channels)] if norm else []))
        self.decoder = nn.Sequential(pointwise(latent_channels, channels, is_map))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent and the reconstruction of `feature`."""
        latent = self.encoder(feature)
        return latent, self.decoder(latent)
