"""FM-KT: map the student's feature to the teacher's class scores by flow matching."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32, dist
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.inputs import check_labels, like_parameters, require_maps
from diffkd.methods.kd import check_logits


class FMKT(nn.Module):
    """Knowledge transfer with flow matching (Shao, Shen, Gong, Chen, Dai, arXiv 2402.02012), on logits.

    From the student's last map S, Z starts at S; for i = N, ..., 1 and t = i / N a small network g gives the velocity
    `v_i = g(Z + embedding(t))`, and `Z <- Z - v_i / N`. Each step estimates the scores at the flow's end, `y_i =
    head(S - v_i)`; "flow" is `1 / N * sum_i (d(y_i, T) + CE(y_i, label))`. The flow is trained along its own path, so
    that training and sampling agree. g is two 3x3 convolutions, the authors' "conv" encoder; d is DIST with beta and
    gamma 2, as in their code.

    The authors evaluate the student together with the flow, or (FM-KT with a Theta) the student alone, which learns
    from the mean of the flow's scores. This class implements the latter: "kd" is DIST between the student's own scores
    and the detached mean of all y_i. Its default weight of 1 is not from the paper.

    Args:
        student: shapes of the student's last map and of its scores.
        teacher: shape of the teacher's scores, in a list.
        steps: N; 8 in the authors' code.
        flow_weight: factor of "flow".
        weight: factor of both losses.

    Raises:
        ValueError: if the features are others, the class counts differ or are below 2, or there are no steps.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature to logits"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    least_classes: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("labels",)

    def __init__(
        self,
        student: Sequence[FeatureShape],
        teacher: Sequence[FeatureShape],
        *,
        steps: int = 8,
        flow_weight: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if len(student) != 2 or len(teacher) != 1:
            raise ValueError(
                f"FMKT needs the student's last map and scores and the teacher's scores, got {len(student)} and "
                f"{len(teacher)} layers"
            )
        if steps < 1:
            raise ValueError(f"steps must be 1 or more, got {steps}")
        feature = student[0]
        require_maps("FMKT", feature)
        check_logits("FMKT", student[1], teacher[0], 1.0)
        channels = feature.channels
        self.velocity = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(1, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        self.time = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))
        self.head = nn.Linear(channels, teacher[0].channels)
        self.steps, self.flow_weight, self.weight = steps, flow_weight, weight

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, labels: Tensor) -> dict[str, Tensor]:
        """Run the flow and compare every step with the teacher.

        Args:
            student: the last map (B, C, H, W) and the logits (B, K).
            teacher: logits (B, K), in a list.
            labels: (B,) int64.

        Returns:
            {"kd": loss of the student's own scores, "flow": loss of the flow's}.
        """
        feature, own = student
        check_labels("FMKT", labels, (len(own),))
        target = teacher[0].detach()
        scores = self.estimates(feature)
        losses = [dist(one, target, 2.0, 2.0) + F.cross_entropy(at_least_float32(one), labels) for one in scores]
        mean = torch.stack([at_least_float32(one) for one in scores]).mean(dim=0).detach()
        return {
            "kd": self.weight * dist(own, mean, 2.0, 2.0),
            "flow": self.weight * self.flow_weight * torch.stack(losses).mean(),
        }

    def estimates(self, feature: Tensor) -> list[Tensor]:
        """Return the scores (B, K) that each step estimates, for the student's last map (B, C, H, W)."""
        start = like_parameters(feature, self)
        position, scores = start, []
        for step in range(self.steps, 0, -1):
            embedding = self.time(time_embedding(step / self.steps, start))
            velocity = self.velocity(position + embedding[:, None, None])
            position = position - velocity / self.steps
            scores.append(self.head((start - velocity).mean(dim=(2, 3))))
        return scores


def time_embedding(time: float, like: Tensor, max_period: float = 10_000.0) -> Tensor:
    """Return cosines and sines of a time, (C,) for maps `like` (B, C, H, W), with periods from 2 pi to `max_period`."""
    channels = like.shape[1]
    half = channels // 2
    frequencies = torch.arange(half, device=like.device, dtype=torch.float32) * (-math.log(max_period) / max(1, half))
    angles = time * frequencies.exp()
    return F.pad(torch.cat([angles.cos(), angles.sin()]), (0, channels - 2 * half)).to(like.dtype)
