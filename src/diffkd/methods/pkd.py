"""PKD: match maps by the Pearson correlation of each channel, for teachers of another family."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32, mse
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.inputs import align, check_same_grid, like_parameters, require_maps


class PKD(nn.Module):
    """Distillation by Pearson's correlation (Cao, Zhang, Gao, Cheng, Cheng, Hu, NeurIPS 2022), for one level.

    `1 / 2 * mean((norm(s) - norm(t))^2)`: every channel is normalised to mean 0 and standard deviation 1 over batch and
    positions, so that the loss is one minus the correlation, up to rounding, and does not depend on the teacher's
    scale. The weight is that of mmrazor for Faster R-CNN and RetinaNet, on the first four levels of the
    pyramid; 10 for a teacher of another family (FCOS to RetinaNet).

    Args:
        student: the student's shape, a map.
        teacher: the teacher's shape, a map; if channels differ, a 1x1 convolution maps the student's to them.
        eps: added to the standard deviation, as in that code.
        weight: factor of the loss.

    Raises:
        ValueError: if one of them is a vector.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"stages"})

    def __init__(self, student: FeatureShape, teacher: FeatureShape, *, eps: float = 1e-6, weight: float = 6.0) -> None:
        super().__init__()
        require_maps("PKD", student, teacher)
        self.student_projection = align(student, teacher)
        self.eps, self.weight = eps, weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for maps (B, Cs, H, W) and (B, Ct, H, W)."""
        check_same_grid(student, teacher)
        ours = self.student_projection(like_parameters(student, self))
        return {"kd": 0.5 * self.weight * mse(self._normalized(ours), self._normalized(teacher.detach()))}

    def _normalized(self, feature: Tensor) -> Tensor:
        feature = at_least_float32(feature)
        centred = feature - feature.mean(dim=(0, 2, 3), keepdim=True)
        values = feature.numel() // feature.shape[1]
        # The unbiased variance, as in the authors' code; the clamp keeps the gradient of a constant channel finite.
        variance = centred.square().sum(dim=(0, 2, 3), keepdim=True) / max(1, values - 1)
        return centred / (variance.clamp_min(1e-20).sqrt() + self.eps)
