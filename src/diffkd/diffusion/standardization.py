"""Scale-free targets: a teacher's feature standardised per channel by running statistics."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, distributed, nn

from diffkd.diffusion.distances import at_least_float32


class Standardization(nn.Module):
    """Standardise (B, C, H, W) or (B, C) per channel: subtract the running mean, divide by the running deviation.

    Noise schedules presume targets of unit variance (Karras et al., *Elucidating the Design Space of Diffusion-Based
    Generative Models*, NeurIPS 2022, Sec. 5), and the squared error of a feature grows with its variance: with
    standardised targets, noise level, losses and weights are comparable across teachers. Ranzinger et al., *PHI-S*,
    arXiv 2410.01680, standardise the teachers' features of RADIO for the same reason.

    The statistics are the exact mean and variance of the first 1 / `momentum` batches together, if these are of one
    size, then exponential moving averages with `momentum`. A batch is included before it is standardised, the first one
    too; one that is not finite is left out. They are updated in training mode only, over the batches of all ranks, and
    stay float32 or wider if the module is cast. Before the first batch the module is the identity.

    A channel's deviation is at least `floor` times the root mean square over all channels, so that a channel that is
    almost never active is not amplified.

    Args:
        channels: C.
        momentum: weight of a new batch in the long run, in (0, 1].
        floor: least deviation of a channel, as a share of the average one.

    Attributes:
        mean: (C,), in units of the feature.
        variance: (C,), likewise squared.
        batches: number of batches seen, an int64 scalar.

    Raises:
        ValueError: if `momentum` is outside (0, 1] or `floor` outside [0, 1).
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.01, floor: float = 0.01) -> None:
        super().__init__()
        if not 0 < momentum <= 1 or not 0 <= floor < 1:
            raise ValueError(
                f"standardisation needs a momentum in (0, 1] and a floor in [0, 1), got {momentum} and {floor}"
            )
        self.momentum, self.floor = momentum, floor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, feature: Tensor) -> Tensor:
        """Update the statistics with a batch (in training mode) and return it standardised.

        Args:
            feature: (B, C, H, W) or (B, C).

        Returns:
            The same shape, float32 or wider.
        """
        feature = at_least_float32(feature)
        if self.training:
            self._update(feature.detach())
        mean, deviation = self._on(feature)
        return (feature - mean) / deviation

    def restore(self, standardized: Tensor) -> Tensor:
        """Invert the standardisation: return `standardized` in the units of the feature."""
        mean, deviation = self._on(standardized)
        return at_least_float32(standardized) * deviation + mean

    def summary(self) -> str:
        """Return mean and standard deviation of the feature as text; waits for the device."""
        if not int(self.batches):
            return "no batch seen"
        deviation = self.variance.sqrt()
        return (
            f"mean {self.mean.mean().item():.3g}, deviation {deviation.mean().item():.3g} "
            f"({deviation.min().item():.3g} to {deviation.max().item():.3g} by channel)"
        )

    def extra_repr(self) -> str:
        """Return the options."""
        return f"{len(self.mean)}, momentum={self.momentum}, floor={self.floor}"

    def _on(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (feature.ndim - 2))
        floor = self.floor**2 * self.variance.mean() + torch.finfo(torch.float32).tiny
        deviation = self.variance.clamp_min(floor).sqrt()
        return self.mean.reshape(shape), deviation.reshape(shape)

    @torch.no_grad()
    def _update(self, feature: Tensor) -> None:
        over = [0, *range(2, feature.ndim)]
        mean, variance = feature.mean(dim=over), feature.var(dim=over, correction=0)  # (C,)
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            mean, variance = _over_all_processes(mean, variance, feature.numel() / len(mean))
        finite = (mean.isfinite() & variance.isfinite()).all()
        mean, variance = torch.where(finite, mean, self.mean), torch.where(finite, variance, self.variance)
        self.batches.add_(finite)
        share = finite * self.batches.clamp_min(1).to(self.mean.dtype).reciprocal().clamp_min(self.momentum)
        difference = mean.to(self.mean.dtype) - self.mean
        # Pooled variance: the average of the two variances, plus the variance of the two means.
        between = share * (1 - share) * difference.square()
        self.variance.copy_((1 - share) * self.variance + share * variance + between)
        self.mean.add_(share * difference)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in ("mean", "variance")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            # A cast to half precision moves the statistics, but keeps their dtype.
            if before is not None and after is not None and after.dtype.itemsize < 4:
                self._buffers[name] = before.to(after.device)
        return self


def _over_all_processes(mean: Tensor, variance: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the entries of all ranks; `count` is the number per channel on each rank."""
    own = torch.cat([mean, variance, mean.new_full((1,), count)])
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, own)
    every = torch.stack(parts)  # (processes, 2 C + 1)
    means, variances, counts = every[:, : len(mean)], every[:, len(mean) : -1], every[:, -1:]
    shares = counts / counts.sum()
    mean = (shares * means).sum(dim=0)
    return mean, (shares * (variances + (means - mean).square())).sum(dim=0)
