"""Options of the detection and segmentation tasks."""

from dataclasses import dataclass

from diffkd.models.detectors.backbone_norm import Norm


@dataclass(frozen=True)
class DetectionOptions:
    """Options of detectors built by name, for student and teacher (:func:`~diffkd.models.detectors.load`).

    Args:
        fpn_channels: channels of the feature pyramid and of the heads on it.
        norm: normalisation of the backbone: "batch", "frozen" (BatchNorm as it was pretrained), "group", or "auto".
        anchor_scale: size of the anchors, 1 for images of 800 pixels; None: as the size of the images.
    """

    fpn_channels: int = 256
    norm: Norm = "auto"
    anchor_scale: float | None = None


@dataclass(frozen=True)
class SegmentationOptions:
    """Options of the segmentation task.

    Args:
        window: (H, W) in pixels of the windows that evaluation slides over an image; None: the image as a whole.
        window_stride: (H, W) in pixels between two windows; None: two thirds of the window.
        auxiliary: train with an auxiliary head, where the model has one.
        auxiliary_weight: factor of its cross entropy; 0.4 in PSPNet (Zhao et al., CVPR 2017).

    Raises:
        ValueError: if a number is out of range, or windows would leave gaps.
    """

    window: tuple[int, int] | None = None
    window_stride: tuple[int, int] | None = None
    auxiliary: bool = False
    auxiliary_weight: float = 0.4

    def __post_init__(self) -> None:
        if self.auxiliary_weight < 0:
            raise ValueError(f"auxiliary_weight must be at least 0, got {self.auxiliary_weight}")
        if self.window is None:
            if self.window_stride is not None:
                raise ValueError(f"window_stride {self.window_stride} needs a window; give segmentation.window too")
            return
        stride = self.stride
        if min(*self.window, *stride) < 1 or stride[0] > self.window[0] or stride[1] > self.window[1]:
            raise ValueError(f"window {self.window} and window_stride {stride} must be positive and leave no gap")

    @property
    def stride(self) -> tuple[int, int]:
        """The stride, or its default."""
        height, width = self.window or (0, 0)
        return self.window_stride or (max(1, height * 2 // 3), max(1, width * 2 // 3))


DEFAULT_DETECTION = DetectionOptions()
DEFAULT_SEGMENTATION = SegmentationOptions()
