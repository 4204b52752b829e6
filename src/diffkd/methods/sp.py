"""SP: match the similarities between the images of a batch."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.features.shape import FeatureShape, Resizing, Want
from diffkd.methods.inputs import full_precision, unit


class SP(nn.Module):
    """Similarity-preserving distillation (Tung, Mori, ICCV 2019).

    `1 / B^2 * |G_t - G_s|_F^2`, where G are the inner products of the images' features, each row divided by its norm.
    On the last stage, as in RepDistiller. Invariant to orthogonal transformations and permutations of a feature's
    entries; 0 for a batch of one.

    Args:
        student: the student's shape.
        teacher: the teacher's shape; channels and positions may differ.
        weight: factor of the loss; 3000 in paper, RepDistiller and mdistiller.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"last stage"})
    resizes: ClassVar[Resizing] = "none"
    least_batch: ClassVar[int] = 2

    def __init__(self, student: FeatureShape, teacher: FeatureShape, *, weight: float = 3000.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for features (B, Cs, H, W) or (B, Cs), and (B, Ct, H, W) or (B, Ct)."""
        with full_precision(student):
            difference = _similarities(student) - _similarities(teacher.detach())
            return {"kd": self.weight * difference.square().mean()}


def _similarities(feature: Tensor) -> Tensor:
    rows = at_least_float32(feature).flatten(1)
    return unit(rows @ rows.T)
