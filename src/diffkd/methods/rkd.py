"""RKD: match the distances and angles between the images of a batch."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.features.shape import FeatureShape, Resizing, Want
from diffkd.methods.inputs import embed, full_precision, unit


class RKD(nn.Module):
    """Relational knowledge distillation (Park, Kim, Lu, Cho, CVPR 2019), on embeddings.

    Huber losses between the student's and the teacher's Euclidean distances, each divided by its mean in the batch, and
    between the cosines of all angles that three images form. Maps are averaged over positions. Invariant to rotating,
    shifting and scaling all embeddings; 0 for a batch of one. The means run over all B^2 and B^3 entries, as in the
    authors' code.

    Args:
        student: the student's shape.
        teacher: the teacher's shape; channels may differ.
        distance_weight: factor of the distances; 25 in the paper's RKD-DA, RepDistiller and mdistiller.
        angle_weight: factor of the angles; 50 there.
        weight: factor of the loss.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature"})
    resizes: ClassVar[Resizing] = "none"
    least_batch: ClassVar[int] = 2

    def __init__(
        self,
        student: FeatureShape,
        teacher: FeatureShape,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.distance_weight, self.angle_weight, self.weight = distance_weight, angle_weight, weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for features (B, Cs, H, W) or (B, Cs), and (B, Ct, H, W) or (B, Ct)."""
        with full_precision(student):
            student, teacher = embed(student), embed(teacher.detach())
            distances = F.smooth_l1_loss(_distances(student), _distances(teacher))
            angles = F.smooth_l1_loss(_angles(student), _angles(teacher))
            return {"kd": self.weight * (self.distance_weight * distances + self.angle_weight * angles)}


def _distances(x: Tensor) -> Tensor:
    # From differences: the matrix-product formula is inexact for close points.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = max(1, len(x) * (len(x) - 1))
    return distances / (distances.sum() / pairs).clamp_min(torch.finfo(x.dtype).tiny)


def _angles(x: Tensor) -> Tensor:
    """Return the cosine of the angle at j between i and k, as entry (j, i, k)."""
    directions = unit(x[None, :] - x[:, None], dim=2)
    return directions @ directions.transpose(1, 2)
