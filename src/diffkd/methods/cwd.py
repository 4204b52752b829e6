"""CWD: match each channel's softmax distribution over positions."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.inputs import align, check_same_grid, like_parameters, require_maps


class CWD(nn.Module):
    """Channel-wise distillation (Shu, Liu, Gao, Yan, Shen, ICCV 2021), on maps of features or classes.

    `tau^2 / C * sum_c KL(softmax(t_c / tau) || softmax(s_c / tau))`, averaged over the batch; the softmax runs over the
    positions of a channel. The divisor is that of the paper, images times channels, also where the authors' code uses
    another. Invariant to adding a constant to a channel. A 1x1 convolution maps the student's channels to the
    teacher's if they differ.

    Args:
        student: the student's shape, a map.
        teacher: the teacher's shape, a map.
        temperature: tau > 0; 4 in the paper.
        weight: factor of the loss; None: the paper's 3 for class maps and 50 for features.

    Raises:
        ValueError: if one of them is a vector, or `temperature` is not positive.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"class map"})

    def __init__(
        self,
        student: FeatureShape,
        teacher: FeatureShape,
        *,
        temperature: float = 4.0,
        weight: float | None = None,
    ) -> None:
        super().__init__()
        require_maps("CWD", student, teacher)
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.student_projection = align(student, teacher)
        self.temperature = temperature
        self.weight = weight if weight is not None else 3.0 if teacher.role == "logits" else 50.0

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for maps (B, Cs, H, W) and (B, Ct, H, W)."""
        check_same_grid(student, teacher)
        ours = self._log_softmax(self.student_projection(like_parameters(student, self)))
        theirs = self._log_softmax(teacher.detach())
        divergence = (theirs.exp() * (theirs - ours)).sum(dim=2)  # (B, C)
        return {"kd": self.weight * self.temperature**2 * divergence.mean()}

    def _log_softmax(self, feature: Tensor) -> Tensor:
        return (at_least_float32(feature).flatten(2) / self.temperature).log_softmax(dim=2)
