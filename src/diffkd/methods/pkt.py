"""PKT: match the probabilities with which images are each other's neighbours."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.features.shape import FeatureShape, Resizing, Want
from diffkd.methods.inputs import embed, full_precision, unit


class PKT(nn.Module):
    """Probabilistic knowledge transfer (Passalis, Tefas, ECCV 2018), on embeddings.

    `mean(p_t * log(p_t / p_s))` over all pairs of images, where p is (cosine similarity + 1) / 2, each row over its
    sum. Maps are averaged over positions. Unchanged by rotating and scaling; for a batch of one it is 0. The paper
    leaves an image's similarity to itself out and sums; the authors' code keeps it and averages, and so does this.

    Args:
        student: the student's shape.
        teacher: the teacher's shape; channels need not agree.
        eps: added to the probabilities in the logarithm, as in the authors' code.
        weight: factor of the loss; 30000 in RepDistiller and mdistiller.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature"})
    resizes: ClassVar[Resizing] = "none"
    least_batch: ClassVar[int] = 2

    def __init__(
        self, student: FeatureShape, teacher: FeatureShape, *, eps: float = 1e-7, weight: float = 30000.0
    ) -> None:
        super().__init__()
        self.eps, self.weight = eps, weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for features (B, Cs, H, W) or (B, Cs), and (B, Ct, H, W) or (B, Ct)."""
        with full_precision(student):
            ours, theirs = self._neighbours(student), self._neighbours(teacher.detach())
            return {"kd": self.weight * (theirs * ((theirs + self.eps) / (ours + self.eps)).log()).mean()}

    def _neighbours(self, feature: Tensor) -> Tensor:
        rows = unit(embed(feature))
        # Rounding may take a cosine past -1, and the logarithm of a negative number is none.
        kernel = ((rows @ rows.T + 1) / 2).clamp_min(0)
        return kernel / kernel.sum(dim=1, keepdim=True)
