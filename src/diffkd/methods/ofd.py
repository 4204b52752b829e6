"""OFD: match features before their activation by a margin ReLU and a partial distance."""

from collections.abc import Sequence
from math import pi, sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.diffusion.modules import BatchNorm
from diffkd.features.reader import SideName
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.inputs import averaged, like_parameters, require_maps


class OFD(nn.Module):
    """Overhaul of feature distillation (Heo, Kim, Yun, Park, Kwak, Choi, ICCV 2019).

    `sum_l 2^(l - L) / B * sum d(max(t, m), r(s))`: the teacher's values are clamped from below at a margin m per
    channel, the mean of its negative values; r is a 1x1 convolution with batch normalisation; d is the squared
    difference, but 0 where `s <= max(t, m) <= 0`, since the ReLU maps both to 0. The deepest level weighs 1, each
    shallower one half of the next. Automatic pairing gives it maps before their ReLU ("layer3@pre") on both sides, with
    the margins of the teacher's BatchNorms right before (:func:`margin_of`); after a ReLU there are no negative values,
    and m is 0. Without such a BatchNorm and without given margins, m is a running average over the training batches
    (of all ranks). The convolutions are initialised as in the authors' code: normal, with the variance 2 / outputs.

    Args:
        student: shapes of the student's maps, from shallow to deep.
        teacher: shapes of the teacher's maps, one for each of the student's.
        margins: m of every level, (C,) each; None: those of the teacher's BatchNorms, or estimates.
        momentum: share of the newest batch in the estimate, as in batch normalisation.
        weight: factor of the loss; 1e-3 in the authors' code and mdistiller for CIFAR-100, 1e-4 for ImageNet.

    Raises:
        ValueError: if there are no levels, their numbers differ, one is a vector, or margins do not fit.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"levels"})
    before_activation: ClassVar[frozenset[SideName]] = frozenset({"student", "teacher"})

    def __init__(
        self,
        student: Sequence[FeatureShape],
        teacher: Sequence[FeatureShape],
        *,
        margins: Sequence[Tensor] | None = None,
        momentum: float = 0.1,
        weight: float = 1e-3,
    ) -> None:
        super().__init__()
        if not student or len(student) != len(teacher):
            raise ValueError(f"OFD needs as many levels on both sides, got {len(student)} and {len(teacher)}")
        require_maps("OFD", *student, *teacher)
        given = [None] * len(teacher) if margins is None else list(margins)
        if len(given) != len(teacher):
            raise ValueError(f"OFD has {len(teacher)} levels, but got {len(given)} margins; give one for each")
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(ours.channels, theirs.channels, 1, bias=False), BatchNorm(theirs.channels))
            for ours, theirs in zip(student, teacher, strict=True)
        )
        self.margins = nn.ModuleList(
            Margin(shape.channels, margin, momentum) for shape, margin in zip(teacher, given, strict=True)
        )
        for connector in self.connectors:
            nn.init.kaiming_normal_(connector.get_parameter("0.weight"), mode="fan_out", nonlinearity="relu")
        self.weight = weight

    def take_norms(self, norms: Sequence[nn.Module | None]) -> None:
        """Compute margins that were not given from the teacher's BatchNorms right before its activations."""
        for margin, norm in zip(self.margins, norms, strict=True):
            if norm is not None and isinstance(margin, Margin) and margin.estimates:
                margin.fix(margin_of(norm))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return {"kd": loss} for maps (B, Cs, H, W) and (B, Ct, H', W') of every level, from shallow to deep.

        Where sizes differ, the teacher's map is averaged to the student's.
        """
        losses = []
        for depth, (connector, margin) in enumerate(zip(self.connectors, self.margins, strict=True)):
            ours = at_least_float32(connector(like_parameters(student[depth], connector)))
            theirs = at_least_float32(teacher[depth].detach())
            theirs = margin(theirs)
            if theirs.shape[2:] != ours.shape[2:]:
                theirs = F.adaptive_avg_pool2d(theirs, (ours.shape[2], ours.shape[3]))
            losses.append(partial_distance(ours, theirs) / 2 ** (len(self.connectors) - 1 - depth))
        return {"kd": self.weight * torch.stack(losses).sum()}


class Margin(nn.Module):
    """Clamps a map from below at the mean negative value of each channel, given or estimated in training.

    Args:
        channels: C.
        margin: (C,) values, none positive; None: estimate them.
        momentum: share of the newest batch in the estimate.
    """

    negative: Tensor

    def __init__(self, channels: int, margin: Tensor | None = None, momentum: float = 0.1) -> None:
        super().__init__()
        if margin is not None and margin.shape != (channels,):
            raise ValueError(
                f"a margin of {tuple(margin.shape)} does not fit {channels} channels; give one value for each"
            )
        self.estimates, self.momentum = margin is None, momentum
        # Means over all values of min(x, 0) and of (x < 0): their quotient is the mean negative value, in which the
        # bias of the running averages towards their initial 0 cancels.
        known = torch.zeros(2, channels) if margin is None else torch.stack([margin, torch.ones_like(margin)])
        self.register_buffer("negative", known)

    def fix(self, margin: Tensor) -> None:
        """Set the margin to these values, (C,), and stop estimating it."""
        self.estimates = False
        self.negative.copy_(torch.stack([margin, torch.ones_like(margin)]))

    def forward(self, x: Tensor) -> Tensor:
        """Return max(x, m) for x, (B, C, H, W)."""
        if self.estimates and self.training:
            with torch.no_grad():
                seen = torch.stack([x.clamp(max=0).mean(dim=(0, 2, 3)), (x < 0).to(x.dtype).mean(dim=(0, 2, 3))])
                seen = averaged(seen).to(self.negative.dtype)
                # A batch that is not finite would stay in the average for ever.
                self.negative.lerp_(torch.where(seen.isfinite().all(), seen, self.negative), self.momentum)
        total, share = at_least_float32(self.negative)
        margin = total / share.masked_fill(share == 0, 1)
        return torch.maximum(x, margin.to(x.dtype)[:, None, None])


def partial_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return `1 / B * sum (t - s)^2` without the entries where `s <= t <= 0`, for equal shapes."""
    counts = (student > teacher) | (teacher > 0)
    return ((student - teacher).square() * counts).sum() / len(student)


def margin_of(norm: nn.Module) -> Tensor:
    """Return the mean negative value of every channel after a batch normalisation, (C,), from its scale and shift.

    For a Gaussian of mean mu and deviation sigma, `mu - sigma * pdf(mu / sigma) / cdf(-mu / sigma)`; where
    negative values are rarer than one in a thousand, -3 sigma, as in the authors' code.

    Raises:
        ValueError: if the normalisation has no scale and shift.
    """
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(scale, Tensor) or not isinstance(shift, Tensor):
        raise ValueError("the batch normalisation has no scale and shift; let OFD estimate the margins")
    sigma, mu = scale.detach().abs().double().clamp_min(1e-12), shift.detach().double()
    ratio = mu / sigma
    below = torch.special.ndtr(-ratio)
    mean = mu - sigma * (-(ratio**2) / 2).exp() / sqrt(2 * pi) / below
    return torch.where(below > 0.001, mean, -3 * sigma).to(scale.dtype)
