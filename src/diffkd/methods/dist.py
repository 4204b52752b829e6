"""DIST: match the relations of the class scores instead of the scores."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.diffusion.distances import dist
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.kd import check_logits, standardize


class DIST(nn.Module):
    """Distillation from a stronger teacher, on logits (Huang et al., NeurIPS 2022, Eq. 8 to 10).

    Args:
        student: the student's number of classes or shape, checked against the teacher's; optional.
        teacher: the teacher's number of classes or shape.
        beta: weight of the relation between classes.
        gamma: weight of the relation between samples.
        temperature: tau > 0. The DIST paper takes 1 for ImageNet and 4 for CIFAR-100.
        standardize: first standardise the logits of each sample to mean 0 and standard deviation 1 (Sun et al., *Logit
            Standardization in Knowledge Distillation*, CVPR 2024).
        pool_positions: on maps, correlate over all positions of all images, for dense prediction (Huang et al., Sec.
            4.4); False: correlate over the images of the batch, separately at each position.
        weight: factor of the loss.

    Raises:
        ValueError: if the class counts differ or are below 2, or `temperature` is not positive.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"logits"})
    least_classes: ClassVar[int] = 2

    def __init__(
        self,
        student: int | FeatureShape | None = None,
        teacher: int | FeatureShape | None = None,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        standardize: bool = False,
        pool_positions: bool = True,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_logits("DIST", student, teacher, temperature)
        self.standardize, self.pool_positions = standardize, pool_positions
        self.beta, self.gamma, self.temperature, self.weight = beta, gamma, temperature, weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for logits (B, K) or (B, K, H, W)."""
        teacher = teacher.detach()
        if self.standardize:
            student, teacher = standardize(student), standardize(teacher)
        loss = dist(student, teacher, self.beta, self.gamma, self.temperature, self.pool_positions)
        return {"kd": self.weight * loss}
