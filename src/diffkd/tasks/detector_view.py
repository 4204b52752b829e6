"""What a detector's teacher is given: the very pixels, and proposals, of its student."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from diffkd.recorder import Call
from diffkd.teacher_input import TeacherInput, same_normalization

_TRANSFORM, _POOL = "transform", "roi_heads.box_roi_pool"


class DetectorView:
    """A :class:`~diffkd.student_view.StudentView` of torchvision's detectors.

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
        """Return the arguments of a :class:`~diffkd.models.detector_teacher.DetectorTeacher`."""
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
