"""The teacher's input: re-normalised or resized images, or tensors from the student's forward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn, tensor

from diffkd.features.recorder import Call


class TeacherInput(nn.Module):
    """Converts images normalised for the student to the teacher's normalisation and size.

    Args:
        student_mean: per channel, of the student's normalisation, in the units of images scaled to 0..1.
        student_std: likewise.
        teacher_mean: per channel, of the teacher's normalisation.
        teacher_std: likewise.
        size: (H, W) in pixels of the teacher's input; None: as the student's.

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
        # Cast to the images' device and dtype, since the example is processed before the distiller's first `.to()`.
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
    """Builds the teacher's input, and arguments of methods, from recorded calls of the student's layers.

    A detector resizes and pads its images itself, to a size drawn at random in training: the teacher's images and the
    positions of the boxes in them are only available in its forward.

    Attributes:
        layers: names of the student's layers whose calls are recorded.
    """

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the student's layers whose calls are recorded."""

    def __call__(self, inputs: Any, calls: Mapping[str, Call]) -> Any:
        """Return the teacher's input, from the student's input and the recorded calls by name."""

    def context(self, inputs: Any, calls: Mapping[str, Call]) -> dict[str, Any]:
        """Return arguments of methods by name, such as "boxes"."""


_TRANSFORM, _POOL = "transform", "roi_heads.box_roi_pool"


class DetectorView:
    """A :class:`~diffkd.teacher.view.StudentView` of torchvision's detectors.

    The student resizes, normalises and pads its images in its `transform`, to a size drawn at random in training. The
    teacher gets the result, so that both get identical pixels, and for its box head the proposals of the student, so
    that both outputs are for the same boxes.

    Args:
        renormalise: converts images normalised for the student to the teacher's normalisation; None: they are equal.
        proposals: pass the student's proposals on, for two-stage detectors whose outputs are distilled.
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
    """Return the view by which the teacher gets the images from the student's transform.

    Raises:
        ValueError: if one of them has no such transform, or heads of different kinds are to be compared.
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
