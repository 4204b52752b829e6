"""Cosine: the angle between the teacher's feature and the student's, at every position."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.diffusion.modules import pointwise
from diffkd.features.shape import FeatureShape, Want, channels_of
from diffkd.methods.inputs import like_parameters


class Cosine(nn.Module):
    """`1 - cos(W s, t)`, averaged over images and positions; W is a 1x1 convolution or a linear layer.

    The feature loss of foundation models that are distilled into small ones: Ranzinger et al., *AM-RADIO: Agglomerative
    Vision Foundation Model*, CVPR 2024, Eq. 2, for the summary token and, beside a smooth L1, for the patch tokens. It
    does not depend on the scale of the teacher's feature.

    Args:
        student_channels: channels of the student's feature, or its shape.
        teacher_channels: channels of the teacher's feature, or its shape. Vectors need shapes.
        weight: factor of the loss.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature", "embedding"})

    def __init__(
        self, student_channels: int | FeatureShape, teacher_channels: int | FeatureShape, *, weight: float = 1.0
    ) -> None:
        super().__init__()
        is_map = teacher_channels.is_map if isinstance(teacher_channels, FeatureShape) else True
        self.student_projection = pointwise(channels_of(student_channels), channels_of(teacher_channels), is_map)
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for features (B, Cs, H, W), (B, Ct, H, W), or (B, Cs), (B, Ct)."""
        projected = at_least_float32(self.student_projection(like_parameters(student, self)))
        likeness = F.cosine_similarity(projected, at_least_float32(teacher.detach()), dim=1)
        return {"kd": self.weight * (1 - likeness).mean()}
