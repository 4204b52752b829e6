"""ReviewKD: fuse the student's levels from deep to shallow and compare them with the teacher's."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.diffusion.distances import mse
from diffkd.diffusion.modules import BatchNorm
from diffkd.features.reader import SideName
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.inputs import like_parameters, require_maps


class ReviewKD(nn.Module):
    """Knowledge review (Chen, Liu, Zhao, Jia, CVPR 2021).

    From the deepest level to the shallowest, the student's map is fused with the fused deeper map, weighted position by
    position, and compared with the teacher's map by :func:`hierarchical_loss`; the losses are summed. Student and
    teacher may differ in channels and sizes.

    The authors' code takes the stages, the teacher's before their ReLU ("layer3@pre"; on ImageNet the student's too),
    and the average of the last map before the classifier, after its ReLU, as one more level, the "pooled" one.
    Automatic pairing gives that map as the last of the list; it is recognised by having the size of the level before.
    If the last two maps differ in size, the deepest is averaged for the pooled level.

    Weights of that code for CIFAR-100: 5 for most pairs, 0.6 for ResNet-56 to ResNet-20, 1 for ResNet-110 to ResNet-32,
    8 for ResNet-32x4 to ShuffleNetV2, warmed up linearly over 20 epochs; for ImageNet (mdistiller) 1 for ResNet-34 to
    ResNet-18, 8 for ResNet-50 to MobileNetV1, whose fusion is 256 wide.

    Args:
        student: shapes of the student's maps, from shallow to deep.
        teacher: shapes of the teacher's maps, one for each of the student's.
        hidden_channels: channels of the fusion; None: those of the student's deepest map, at most 512, as in that code.
        pooled: compare averages over positions as the last level, as that code does.
        weight: factor of the loss.

    Raises:
        ValueError: if there are no levels, their numbers differ, or one is a vector.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"levels", "pooled"})
    before_activation: ClassVar[frozenset[SideName]] = frozenset({"teacher"})

    def __init__(
        self,
        student: Sequence[FeatureShape],
        teacher: Sequence[FeatureShape],
        *,
        hidden_channels: int | None = None,
        pooled: bool = True,
        weight: float = 5.0,
    ) -> None:
        super().__init__()
        if not student or len(student) != len(teacher):
            raise ValueError(f"ReviewKD needs as many levels on both sides, got {len(student)} and {len(teacher)}")
        require_maps("ReviewKD", *student, *teacher)
        channels = [(ours.channels, theirs.channels) for ours, theirs in zip(student, teacher, strict=True)]
        # If the last two maps have one size, the classifier averages the last one.
        self.given_pooled = (
            pooled and len(student) > 1 and all(one[-1].size == one[-2].size for one in (student, teacher))
        )
        if pooled and not self.given_pooled:
            channels.append(channels[-1])
        hidden = hidden_channels or min(512, student[-1].channels)
        deepest = len(channels) - 1
        self.fusions = nn.ModuleList(
            Fusion(ours, hidden, theirs, fuses=level < deepest) for level, (ours, theirs) in enumerate(channels)
        )
        self.pooled, self.weight = pooled, weight

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return {"kd": loss} for maps (B, Cs, H, W) and (B, Ct, H, W) of every level, from shallow to deep."""
        student, teacher = list(student), list(teacher)
        if self.pooled:
            last = [side.pop() if self.given_pooled else side[-1] for side in (student, teacher)]
            for side, feature in zip((student, teacher), last, strict=True):
                side.append(feature.mean(dim=(2, 3), keepdim=True))
        deeper: Tensor | None = None
        losses = []
        for fusion, ours, theirs in zip(reversed(self.fusions), reversed(student), reversed(teacher), strict=True):
            output, deeper = fusion(ours, deeper, theirs.shape[2:])
            losses.append(hierarchical_loss(output, theirs.detach()))
        return {"kd": self.weight * torch.stack(losses).sum()}


class Fusion(nn.Module):
    """Attention-based fusion of a level with the deeper ones.

    Args:
        in_channels: channels of the student's map.
        hidden_channels: channels of the fused map.
        out_channels: channels of the teacher's map.
        fuses: whether there is a deeper level.
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, fuses: bool = True) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(in_channels, hidden_channels, 1, bias=False), BatchNorm(hidden_channels))
        self.widen = nn.Sequential(
            nn.Conv2d(hidden_channels, out_channels, 3, padding=1, bias=False), BatchNorm(out_channels)
        )
        self.attention = nn.Sequential(nn.Conv2d(2 * hidden_channels, 2, 1), nn.Sigmoid()) if fuses else None
        for convolution in (self.narrow[0], self.widen[0]):
            nn.init.kaiming_uniform_(convolution.get_parameter("weight"), a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the map to compare, (B, out_channels, *size), and the fused map for the next level."""
        x = self.narrow(like_parameters(x, self))
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            ours, theirs = self.attention(torch.cat([x, deeper], dim=1)).chunk(2, dim=1)
            x = x * ours + deeper * theirs
        x = F.interpolate(x, tuple(size), mode="nearest")
        return self.widen(x), x


def hierarchical_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the hierarchical context loss: a weighted mean of squared errors of the maps and of their averages.

    The maps themselves weigh 1; their averages on 4x4, 2x2 and 1x1 grids 1/2, 1/4 and 1/8. Grids that are not coarser
    than the maps are skipped, and their weights move to the next grid.

    Args:
        student: (B, C, H, W).
        teacher: the same shape.
    """
    loss, weight, total = mse(student, teacher), 1.0, 1.0
    for grid in (4, 2, 1):
        if grid < min(student.shape[2:]):
            weight /= 2
            total += weight
            coarse = (F.adaptive_avg_pool2d(x, grid) for x in (student, teacher))
            loss = loss + weight * mse(*coarse)
    return loss / total
