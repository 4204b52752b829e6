"""VID: maximise a lower bound of the mutual information of the student's and the teacher's feature."""

from math import expm1, log
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.features.shape import FeatureShape, Resizing, Want
from diffkd.methods.inputs import like_parameters


class VID(nn.Module):
    """Variational information distillation (Ahn, Hu, Damianou, Lawrence, Dai, CVPR 2019), for one pair.

    `mean((t - mu(s))^2 / (2 sigma_c^2) + log(sigma_c))`: the teacher's feature is Gaussian around a regression of the
    student's, three 1x1 convolutions without bias and with ReLUs between, with one learned variance per channel,
    `softplus(alpha_c) + eps`.
    The loss falls below 0 once the regression is good.

    Args:
        student: the student's shape.
        teacher: the teacher's shape, of the same kind (map or vector).
        hidden_channels: width of the regression; None: the teacher's channels, as in RepDistiller.
        initial_variance: of all channels; 5 in RepDistiller and mdistiller.
        eps: least variance; 1e-5 there.
        weight: factor of the loss; 1 there, on every stage of the network. If sizes differ, the larger map is averaged
            to the smaller.

    Raises:
        ValueError: if one is a map and the other a vector, or `initial_variance` is not above `eps`.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"stages"})
    resizes: ClassVar[Resizing] = "larger"

    def __init__(
        self,
        student: FeatureShape,
        teacher: FeatureShape,
        *,
        hidden_channels: int | None = None,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if student.is_map != teacher.is_map:
            raise ValueError(f"VID needs two maps or two vectors, got {student} and {teacher}; pool the map first")
        if not initial_variance > eps >= 0:
            raise ValueError(f"initial_variance must be above eps >= 0, got {initial_variance} and {eps}")
        hidden = hidden_channels or teacher.channels
        self.regression = nn.Sequential(
            *(_linear(student.channels, hidden, teacher.is_map), nn.ReLU()),
            *(_linear(hidden, hidden, teacher.is_map), nn.ReLU()),
            _linear(hidden, teacher.channels, teacher.is_map),
        )
        self.alpha = nn.Parameter(torch.full((teacher.channels,), log(expm1(initial_variance - eps))))
        self.eps, self.weight = eps, weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for features (B, Cs, H, W), (B, Ct, H, W), or (B, Cs), (B, Ct)."""
        mean = at_least_float32(self.regression(like_parameters(student, self)))
        variance = F.softplus(at_least_float32(self.alpha)) + self.eps
        variance = variance.reshape(-1, *[1] * (mean.ndim - 2))
        error = (at_least_float32(teacher.detach()) - mean).square()
        return {"kd": self.weight * 0.5 * (error / variance + variance.log()).mean()}


def _linear(inputs: int, outputs: int, is_map: bool) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, bias=False) if is_map else nn.Linear(inputs, outputs, bias=False)
