"""WTTM: match the teacher's power-transformed distribution, weighting samples by its smoothness."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.kd import check_logits


class WTTM(nn.Module):
    """Weighted transformed teacher matching (Zheng, Yang, ICLR 2024, arXiv 2402.11148), on logits.

    `mean(U * KL(p_t^gamma / U || p_s))` with `U = sum_k p_t(k)^gamma`: the student's distribution has no temperature,
    the teacher's is raised to the power gamma (a temperature of 1 / gamma), and a sample is weighted by U, which is
    large where the teacher is smooth. The factor tau^2 of KD is absent. On class maps also averaged over positions.

    The defaults are the example of the authors' code for WTTM (gamma 0.2, weight 4, beside CRD, VGG-13 to VGG-8); the
    paper's appendix lists others for each pair. The weight of the labels' loss stays 1.

    Args:
        student: the student's number of classes or shape, checked against the teacher's; optional.
        teacher: the teacher's number of classes or shape.
        gamma: the exponent, above 0; 1 / temperature.
        weighted: multiply by U; False: TTM.
        weight: factor of the loss, beta in the paper.

    Raises:
        ValueError: if the class counts differ or are below 2, or gamma is not above 0.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"logits"})
    least_classes: ClassVar[int] = 2

    def __init__(
        self,
        student: int | FeatureShape | None = None,
        teacher: int | FeatureShape | None = None,
        *,
        gamma: float = 0.2,
        weighted: bool = True,
        weight: float = 4.0,
    ) -> None:
        super().__init__()
        if not gamma > 0:
            raise ValueError(f"gamma must be above 0, got {gamma}")
        check_logits("WTTM", student, teacher, 1 / gamma)
        self.gamma, self.weighted, self.weight = gamma, weighted, weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for logits (B, K) or (B, K, H, W)."""
        ours = at_least_float32(student).log_softmax(dim=1)
        theirs = at_least_float32(teacher.detach()).log_softmax(dim=1)
        # log(p^gamma / U) and log p^gamma.
        target = (self.gamma * theirs).log_softmax(dim=1)
        divergence = (target.exp() * (target - ours)).sum(dim=1)
        if self.weighted:
            divergence = divergence * (self.gamma * theirs).logsumexp(dim=1).exp()
        return {"kd": self.weight * divergence.mean()}
