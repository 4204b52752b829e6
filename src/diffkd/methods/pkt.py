"""PKT: match the conditional similarity distributions of the images of a batch."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.features.shape import FeatureShape, Resizing, Want
from diffkd.methods.inputs import embed, full_precision, unit


class PKT(nn.Module):
    """Probabilistic knowledge transfer (Passalis, Tefas, ECCV 2018), on embeddings.

    `mean(p_t * log(p_t / p_s))` over all pairs of images, where p is (cosine similarity + 1) / 2, each row divided by
    its sum. Maps are averaged over positions. Invariant to rotating and scaling; 0 for a batch of one. The paper
    excludes an image's similarity to itself and sums; the authors' code and this one include it and average.

    Args:
        student: the student's shape.
        teacher: the teacher's shape; channels may differ.
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
        # Rounding may give a cosine below -1, and the logarithm of a negative number is NaN.
        kernel = ((rows @ rows.T + 1) / 2).clamp_min(0)
        return kernel / kernel.sum(dim=1, keepdim=True)
