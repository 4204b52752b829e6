"""What a detector's teacher is given: the very pixels, and proposals, of its student."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diffkd.recorder import Call

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
