"""The teacher's view of the student's input: other normalisation or size, or tensors out of the student's forward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn, tensor

from diffkd.features.recorder import Call


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


@runtime_checkable
class StudentView(Protocol):
    """Makes the teacher's input, and what methods need, from layers of the student that have just run.

    A detector resizes and pads its images itself, to a size drawn at random in training: only it knows the pixels that
    its teacher is to see, and where the boxes lie in them.

    Attributes:
        layers: names of the student's layers that are watched.
    """

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the student's layers that are watched."""

    def __call__(self, inputs: Any, calls: Mapping[str, Call]) -> Any:
        """Return the teacher's input, from the student's and from the watched layers' calls by name."""

    def context(self, inputs: Any, calls: Mapping[str, Call]) -> dict[str, Any]:
        """Return what methods may need, such as "boxes", by name."""


_TRANSFORM, _POOL = "transform", "roi_heads.box_roi_pool"


class DetectorView:
    """A :class:`~diffkd.teacher.view.StudentView` of torchvision's detectors.

    The student resizes, normalises and pads its images in its `transform`, to a size drawn at random in training. The
    teacher gets the result, so that both see identical pixels; and where it has a box head to run, the proposals that
    the student has drawn, so that the outputs are of the same boxes.

    Args:
        renormalise: turns images normalised for the student into those for the teacher; None: they are the same.
        proposals: hand over the student's proposals, for two-stage detectors whose outputs are distilled.
    """

    def __init__(self, renormalise: Callable[[Tensor], Tensor] | None = None, *, proposals: bool = False) -> None:
        self.renormalise = renormalise
        self.layers: tuple[str, ...] = (_TRANSFORM, _POOL) if proposals else (_TRANSFORM,)

    def __call__(self, inputs: Any, calls: Mapping[str, Call]) -> dict[str, Any]:
        """Return the arguments of a :class:`~diffkd.models.detectors.teacher.DetectorTeacher`."""
        batch, _ = calls[_TRANSFORM].output
        images = batch.tensors
        if self.renormalise is not None:
            images = self.renormalise(images)
            for image, (height, width) in zip(images, batch.image_sizes, strict=True):
                image[:, height:] = 0  # as the teacher's own transform pads
                image[:, :, width:] = 0
        arguments = {"images": images, "image_sizes": batch.image_sizes}
        if _POOL in calls:
            arguments["proposals"] = calls[_POOL].args[1]
        return arguments

    def context(self, inputs: Any, calls: Mapping[str, Call]) -> dict[str, Any]:
        """Return "boxes": for each image (n, 4), as fractions of the padded batch's width and height."""
        batch, targets = calls[_TRANSFORM].output
        if targets is None:
            return {}
        height, width = batch.tensors.shape[2:]
        return {"boxes": [target["boxes"] / target["boxes"].new_tensor([width, height] * 2) for target in targets]}


def view_of_detectors(student: nn.Module, teacher: nn.Module, *, heads: bool) -> DetectorView:
    """Return how the teacher sees what the student's transform has made of the images.

    Raises:
        ValueError: if one of them has no such transform, or the outputs of heads of different kinds are to be compared.
    """
    transforms = [getattr(model, "transform", None) for model in (student, teacher)]
    for side, model, transform in zip(("student", "teacher"), (student, teacher), transforms, strict=True):
        if not hasattr(transform, "image_mean") or not hasattr(transform, "image_std"):
            raise ValueError(
                f"{side} {type(model).__name__} has no module 'transform' with image_mean and image_std, as detectors "
                "of torchvision have: so that both see the same pixels, let it resize and normalise there"
            )
    two_stage = [hasattr(model, "roi_heads") for model in (student, teacher)]
    if heads and two_stage[0] != two_stage[1]:
        kinds = " and a ".join(f"{'two' if two else 'one'}-stage" for two in two_stage)
        raise ValueError(
            f"{type(student).__name__} and {type(teacher).__name__} are a {kinds} detector, whose outputs are of "
            "different boxes: distil the feature pyramid alone"
        )
    ours, theirs = ((list(one.image_mean), list(one.image_std)) for one in transforms)  # type: ignore[union-attr]
    return DetectorView(
        None if same_normalization(ours, theirs) else TeacherInput(*ours, *theirs), proposals=heads and two_stage[1]
    )
