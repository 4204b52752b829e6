"""FitNet: regress the teacher's feature from the student's."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.diffusion.distances import mse
from diffkd.diffusion.modules import pointwise
from diffkd.diffusion.standardization import Standardization
from diffkd.features.shape import FeatureShape, Want, channels_of
from diffkd.methods.inputs import like_parameters


class FitNet(nn.Module):
    """Hints: mean squared error between the teacher's feature and the student's after a 1x1 convolution.

    Romero et al., *FitNets: Hints for Thin Deep Nets*, ICLR 2015, Eq. 3; the "MSE" row of the DiffKD paper.

    Args:
        student_channels: channels of the student's feature, or its shape.
        teacher_channels: channels of the teacher's feature, or its shape. Vectors need shapes.
        weight: factor of the loss.
        standardize: standardise the teacher's feature per channel by running statistics, so that the loss does not
            depend on the teacher's scale (:class:`~diffkd.diffusion.standardization.Standardization`).
        last_stage: automatic pairing takes the teacher's last stage where a head's convolution makes a wider map of it,
            as in MobileNets and EfficientNets: fewer channels to compare.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature", "embedding"})

    def __init__(
        self,
        student_channels: int | FeatureShape,
        teacher_channels: int | FeatureShape,
        *,
        weight: float = 1.0,
        standardize: bool = False,
        last_stage: bool = False,
    ) -> None:
        super().__init__()
        is_map = teacher_channels.is_map if isinstance(teacher_channels, FeatureShape) else True
        self.student_projection = pointwise(channels_of(student_channels), channels_of(teacher_channels), is_map)
        self.standardization = Standardization(channels_of(teacher_channels)) if standardize else None
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for features (B, Cs, H, W), (B, Ct, H, W), or (B, Cs), (B, Ct)."""
        projected = self.student_projection(like_parameters(student, self))
        target = teacher.detach()
        if self.standardization is not None:
            target = self.standardization(target)
        return {"kd": self.weight * mse(projected, target)}
