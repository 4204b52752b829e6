"""The teacher's view of the student's input."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn, tensor


class TeacherInput(nn.Module):
    """Turns images normalised for the student into images normalised, and sized, for the teacher.

    Args:
        student_mean: per channel, of the student's normalisation, in the units of images scaled to 0..1.
        student_std: likewise.
        teacher_mean: per channel, of the teacher's normalisation.
        teacher_std: likewise.
        size: (H, W) in pixels that the teacher wants; None: as the student's.

    Raises:
        ValueError: if the channel counts differ or a standard deviation is not positive.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not len(student_mean) == len(student_std) == len(teacher_mean) == len(teacher_std):
            raise ValueError(
                f"means and standard deviations must have one value per channel each, got {len(student_mean)}, "
                f"{len(student_std)}, {len(teacher_mean)} and {len(teacher_std)}"
            )
        if min(*student_std, *teacher_std) <= 0:
            raise ValueError(f"standard deviations must be above 0, got {student_std} and {teacher_std}")
        ours, theirs = tensor(student_std), tensor(teacher_std)
        # ((x * s_std + s_mean) - t_mean) / t_std, folded
        self.register_buffer("scale", (ours / theirs)[:, None, None], persistent=False)
        self.register_buffer(
            "shift", ((tensor(student_mean) - tensor(teacher_mean)) / theirs)[:, None, None], persistent=False
        )
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, C, H', W') for the teacher from the student's (B, C, H, W)."""
        # Moved along, since the example comes before the distiller's first `.to()`, and in the type of the images.
        images = self.scale.to(images) * images + self.shift.to(images)
        if self.size is not None and tuple(images.shape[2:]) != tuple(self.size):
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return images


def same_normalization(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> bool:
    """Whether two normalisations, each (means, standard deviations) by channel, agree up to rounding."""
    return all(
        len(a) == len(b) and all(abs(x - y) < 1e-4 for x, y in zip(a, b, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )
