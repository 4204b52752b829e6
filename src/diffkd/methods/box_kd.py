"""BoxKD: match a detector's class scores and box regression before boxes are selected."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.features.shape import FeatureShape, Want


class BoxKD(nn.Module):
    """Plain knowledge distillation of a detector's outputs: box regression, and optionally class scores.

    DiffKD's authors add it to the feature pyramid (Sec. 4.2 and App. C.5: the regression output, weight 1). "kd" is
    the squared error of the regression, "classes" the divergence of the class scores: of softmax if there is a
    background class (two-stage), of independent sigmoids otherwise.

    By default boxes are weighted, `sum w e / sum w` with w the teacher's probability of a foreground class, since most
    boxes contain no object and their regression is meaningless.

    Args:
        student: shapes of the student's class scores and regression: K and 4 channels (one-stage), or K + 1 and
            4 (K + 1) (two-stage, where class 0 is the background).
        teacher: shapes of the teacher's.
        regression_weight: factor of the regression's loss.
        class_weight: factor of the class scores' loss; 0 leaves it out.
        foreground: weight boxes by the teacher's probability of an object; False: equal weights.

    Raises:
        ValueError: if the shapes are not two of equal channels, or a weight is negative.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"box outputs"})
    tasks: ClassVar[frozenset[str]] = frozenset({"detection"})

    def __init__(
        self,
        student: Sequence[FeatureShape],
        teacher: Sequence[FeatureShape],
        *,
        regression_weight: float = 1.0,
        class_weight: float = 0.0,
        foreground: bool = True,
    ) -> None:
        super().__init__()
        ours, theirs = [shape.channels for shape in student], [shape.channels for shape in teacher]
        if len(ours) != 2 or ours != theirs:
            raise ValueError(
                f"BoxKD compares class scores and regression of equal channels, got {ours} and {theirs}: student and "
                "teacher must have the same classes and kind of head; distil the feature pyramid instead"
            )
        if regression_weight < 0 or class_weight < 0:
            raise ValueError(f"weights must be at least 0, got {regression_weight} and {class_weight}")
        self.has_background = ours[1] == 4 * ours[0] and ours[0] > 1
        self.regression_weight, self.class_weight = regression_weight, class_weight
        self.foreground = foreground

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compare the outputs.

        Args:
            student: class scores (N, K) or (N, K + 1), and regression (N, 4) or (N, 4 (K + 1)), for the same N boxes.
            teacher: the same of the teacher.

        Returns:
            {"kd": regression loss}, and "classes" if it has a weight. 0 where there are no boxes.

        Raises:
            ValueError: if the numbers of boxes differ.
        """
        if len(student[0]) != len(teacher[0]):
            raise ValueError(
                f"the student has {len(student[0])} boxes, the teacher {len(teacher[0])}: their anchors differ; build "
                "both with the same anchors, or distil the feature pyramid alone"
            )
        our_scores, our_boxes = (at_least_float32(one) for one in student)
        scores, boxes = (at_least_float32(one.detach()) for one in teacher)
        if self.has_background:
            probabilities = scores.softmax(dim=1)[:, 1:]  # (N, K)
            error = (
                (our_boxes - boxes).square().reshape(len(boxes), boxes.shape[1] // 4, 4).mean(dim=2)[:, 1:]
            )  # (N, K)
            weight = probabilities if self.foreground else torch.ones_like(probabilities)
        else:
            probabilities = scores.sigmoid()
            error = (our_boxes - boxes).square().mean(dim=1, keepdim=True)  # (N, 1)
            weight = probabilities.amax(dim=1, keepdim=True) if self.foreground else torch.ones_like(error)
        losses = {"kd": self.regression_weight * _weighted_mean(error, weight)}
        if self.class_weight:
            each = self._divergence(our_scores, scores)  # (N, 1)
            per_box = weight.amax(dim=1, keepdim=True) if self.foreground else torch.ones_like(each)
            losses["classes"] = self.class_weight * _weighted_mean(each, per_box)
        return losses

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.has_background:
            ours, theirs = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
            return (theirs.exp() * (theirs - ours)).sum(dim=1, keepdim=True)
        target = teacher.sigmoid()
        cross = F.binary_cross_entropy_with_logits(student, target, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(teacher, target, reduction="none")
        return (cross - entropy).sum(dim=1, keepdim=True)


def _weighted_mean(error: Tensor, weight: Tensor) -> Tensor:
    return (weight * error).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
