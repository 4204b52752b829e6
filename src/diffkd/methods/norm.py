"""NORM: match several expansions of the student's feature with the teacher's."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.diffusion.distances import mse
from diffkd.features.shape import FeatureShape, Resizing, Want
from diffkd.methods.inputs import like_parameters, require_maps


class NORM(nn.Module):
    """N-to-one representation matching (Liu, Li, Li, Yao, ICLR 2023, arXiv 2305.13803), on the last maps.

    `1 / N * sum_i mean((E_i(s) - t)^2)`: a 1x1 convolution E expands the student's map to N times the teacher's
    channels, and each of the N segments is compared with the teacher's map.

    In the paper a second linear layer contracts the expansion and adds it to the student's feature before its
    classifier, and both are merged into that classifier after the training. This implementation does not change the
    student: the matching is the paper's, the residual path is omitted.

    Args:
        student: the student's shape, a map.
        teacher: the teacher's shape, a map.
        segments: N; 8 in the authors' example for CIFAR-100.
        weight: factor of the loss. Their example uses 1 for this loss and 0.1 for that of the labels.

    Raises:
        ValueError: if one of them is a vector, or there is no segment.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature"})
    resizes: ClassVar[Resizing] = "larger"

    def __init__(self, student: FeatureShape, teacher: FeatureShape, *, segments: int = 8, weight: float = 1.0) -> None:
        super().__init__()
        require_maps("NORM", student, teacher)
        if segments < 1:
            raise ValueError(f"segments must be 1 or more, got {segments}")
        self.expansion = nn.Conv2d(student.channels, segments * teacher.channels, 1, bias=False)
        self.segments, self.weight = segments, weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for maps (B, Cs, H, W) and (B, Ct, H, W)."""
        expanded = self.expansion(like_parameters(student, self)).unflatten(1, (self.segments, teacher.shape[1]))
        return {"kd": self.weight * mse(expanded, teacher.detach()[:, None].expand_as(expanded))}
