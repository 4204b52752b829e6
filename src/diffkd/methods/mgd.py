"""MGD: generate the teacher's whole feature from a masked student feature."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.inputs import align, check_same_grid, like_parameters, require_maps


class MGD(nn.Module):
    """Masked generative distillation (Yang, Li, Shao, Shi, Yuan, Yuan, ECCV 2022).

    `1 / B * sum (t - G(f(s) * M))^2`: f is a 1x1 convolution where channels differ, M drops a random share of the
    positions, G is two 3x3 convolutions with a ReLU between.

    The defaults are the paper's for one-stage detectors. Two-stage: ratio 0.45, weight 5e-7. Segmentation: ratio 0.75,
    weight 2e-5. Classification: ratio 0.15, weight 7e-5, and the authors' code drops channels there, not positions.

    Args:
        student: the student's shape, a map.
        teacher: the teacher's shape, a map.
        ratio: share that is dropped, in [0, 1).
        drop: drop whole positions (all channels) or whole channels (all positions).
        weight: factor of the loss.

    Raises:
        ValueError: if one of them is a vector, or an option is out of range.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature"})

    def __init__(
        self,
        student: FeatureShape,
        teacher: FeatureShape,
        *,
        ratio: float = 0.65,
        drop: Literal["positions", "channels"] = "positions",
        weight: float = 2e-5,
    ) -> None:
        super().__init__()
        require_maps("MGD", student, teacher)
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), got {ratio}")
        if drop not in ("positions", "channels"):
            raise ValueError(f"drop must be 'positions' or 'channels', got {drop!r}")
        self.student_projection = align(student, teacher)
        self.generation = nn.Sequential(
            nn.Conv2d(teacher.channels, teacher.channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher.channels, teacher.channels, 3, padding=1),
        )
        self.ratio, self.drop, self.weight = ratio, drop, weight

    def forward(self, student: Tensor, teacher: Tensor, *, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Return {"kd": loss} for maps (B, Cs, H, W) and (B, Ct, H, W).

        Args:
            student: the student's map.
            teacher: the teacher's map.
            keep: M, 1 or True for entries that are kept, (B, 1, H, W) or (B, Ct, 1, 1); None: drawn.
        """
        check_same_grid(student, teacher)
        projected = self.student_projection(like_parameters(student, self))
        if keep is None:
            batch, channels, height, width = projected.shape
            shape = (batch, 1, height, width) if self.drop == "positions" else (batch, channels, 1, 1)
            keep = torch.rand(shape, device=projected.device) >= self.ratio
        generated = at_least_float32(self.generation(projected * keep))
        error = (generated - at_least_float32(teacher.detach())).square()
        return {"kd": self.weight * error.sum() / len(student)}
