"""SRRL: compare the teacher's classifier outputs for the student's and the teacher's feature."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffkd.diffusion.distances import mse
from diffkd.diffusion.modules import BatchNorm
from diffkd.features.shape import FeatureShape, Resizing, Want
from diffkd.methods.inputs import embed, like_parameters


class SRRL(nn.Module):
    """Softmax regression representation learning (Yang, Martinez, Bulat, Tzimiropoulos, ICLR 2021).

    The student's feature goes through a connector (1x1 convolution, batch normalisation, ReLU) to the teacher's
    channels. Two mean squared errors: "feature", between the averages over positions, and "kd", between the logits of
    the teacher's classifier for both. The weights of 1 and the connector's initial values (Kaiming normal, fan-out) are
    those of the authors' code.

    Args:
        student: the student's shape, the last feature before the classifier.
        teacher: the teacher's shape, the same.
        feature_weight: factor of "feature".
        weight: factor of both losses.

    Raises:
        ValueError: if one is a map and the other a vector.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature"})
    resizes: ClassVar[Resizing] = "none"
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    needs: ClassVar[tuple[str, ...]] = ("teacher_head",)

    def __init__(
        self, student: FeatureShape, teacher: FeatureShape, *, feature_weight: float = 1.0, weight: float = 1.0
    ) -> None:
        super().__init__()
        if student.is_map != teacher.is_map:
            raise ValueError(f"SRRL needs two maps or two vectors, got {student} and {teacher}; pool the map first")
        channels = student.channels, teacher.channels
        linear = nn.Conv2d(*channels, 1, bias=False) if teacher.is_map else nn.Linear(*channels, bias=False)
        nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        self.connector = nn.Sequential(linear, BatchNorm(teacher.channels), nn.ReLU())
        self.feature_weight, self.weight = feature_weight, weight

    def forward(
        self, student: Tensor, teacher: Tensor, *, teacher_head: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Compare the features, and the logits of the teacher's head for them.

        Args:
            student: (B, Cs, H, W) or (B, Cs).
            teacher: (B, Ct, H, W) or (B, Ct).
            teacher_head: the rest of the frozen teacher after the layer: a feature of the teacher's shape to logits.

        Returns:
            {"kd": loss of the logits, "feature": loss of the features}.
        """
        connected = self.connector(like_parameters(student, self.connector)).to(teacher.dtype)
        with torch.no_grad():
            target = teacher_head(teacher)
        return {
            "kd": self.weight * mse(teacher_head(connected), target),
            "feature": self.weight * self.feature_weight * mse(embed(connected), embed(teacher.detach())),
        }
