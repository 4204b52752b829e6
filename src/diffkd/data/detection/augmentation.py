"""Joint augmentation of an image and its boxes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from diffkd.data.detection.annotated_files import ImageBoxes, measurable


@dataclass(frozen=True)
class BoxAugmentation:
    """Options of the augmentation of training images and their boxes; the default changes nothing.

    The order is: scale, crop, flip, colour jitter. Multi-scale training is not included: the detector draws its input
    size itself.

    Args:
        flip: mirror left to right with probability 1/2.
        scale_jitter: largest relative change of the size, drawn from [1 - scale_jitter, 1 + scale_jitter]; 0 is off.
        min_crop: smallest share of each side that a random crop keeps, in (0, 1]; 1 is off. Boxes are clipped to the
            crop; those whose centre is outside of it are dropped.
        color_jitter: largest relative change of brightness, contrast and saturation, each drawn from
            [1 - color_jitter, 1 + color_jitter]; 0 is off.

    Raises:
        ValueError: if a value is out of its range.
    """

    flip: bool = False
    scale_jitter: float = 0.0
    min_crop: float = 1.0
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.scale_jitter < 1 and 0 < self.min_crop <= 1 and 0 <= self.color_jitter <= 1):
            raise ValueError(
                f"scale_jitter={self.scale_jitter} must be in [0, 1), min_crop={self.min_crop} in (0, 1], "
                f"color_jitter={self.color_jitter} in [0, 1]."
            )


FLIP_BOXES = BoxAugmentation(flip=True)


def augment_boxes(image: Tensor, boxes: ImageBoxes, augmentation: BoxAugmentation) -> tuple[Tensor, ImageBoxes]:
    """Augment an image and its boxes; all draws use torch's global CPU generator.

    Args:
        image: (3, H, W) uint8.
        boxes: its boxes.
        augmentation: the options.

    Returns:
        The image, (3, H', W') uint8, and the remaining boxes.
    """
    if augmentation.scale_jitter:
        factor = 1 + augmentation.scale_jitter * (2 * torch.rand(()).item() - 1)
        # Torch 2.15 cannot scale uint8 images to a single pixel.
        size = (max(2, round(image.shape[1] * factor)), max(2, round(image.shape[2] * factor)))
        image, boxes = resize(image, boxes, size)
    if augmentation.min_crop < 1:
        image, boxes = _random_crop(image, boxes, augmentation.min_crop)
    if augmentation.flip and torch.rand(()) < 0.5:
        image, boxes = flip(image, boxes)
    if augmentation.color_jitter:
        jitter = augmentation.color_jitter
        image = v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter)(image)
    return image, boxes


def flip(image: Tensor, boxes: ImageBoxes) -> tuple[Tensor, ImageBoxes]:
    """Mirror an image (3, H, W) and its boxes left to right."""
    mirrored = v2.functional.horizontal_flip(_tracked(image, boxes))
    return v2.functional.horizontal_flip(image), boxes._replace(boxes=_plain(mirrored))


def resize(image: Tensor, boxes: ImageBoxes, size: tuple[int, int]) -> tuple[Tensor, ImageBoxes]:
    """Scale an image (3, H, W) and its boxes to (H', W') pixels; boxes without remaining extent are dropped."""
    scaled = _plain(v2.functional.resize(_tracked(image, boxes), list(size)))
    ratio = size[0] * size[1] / (image.shape[1] * image.shape[2])
    kept = measurable(scaled)
    image = v2.functional.resize(image, list(size), antialias=True)
    return image, boxes._replace(boxes=scaled, area=boxes.area * ratio).keep(kept)


def crop(image: Tensor, boxes: ImageBoxes, top: int, left: int, height: int, width: int) -> tuple[Tensor, ImageBoxes]:
    """Crop a window of an image (3, H, W); boxes with their centre outside are dropped, the others clipped.

    The `area` of an object is reduced in proportion to the area of its box.
    """
    centres = (boxes.boxes[:, :2] + boxes.boxes[:, 2:]) / 2
    start = torch.tensor([left, top])
    inside = ((centres >= start) & (centres < start + torch.tensor([width, height]))).all(dim=1)
    boxes = boxes.keep(inside)
    cut = _plain(v2.functional.crop(_tracked(image, boxes), top, left, height, width))
    share = _extent(cut) / _extent(boxes.boxes)
    kept = measurable(cut)
    image = v2.functional.crop(image, top, left, height, width)
    return image, boxes._replace(boxes=cut, area=boxes.area * share).keep(kept)


def _random_crop(image: Tensor, boxes: ImageBoxes, smallest: float) -> tuple[Tensor, ImageBoxes]:
    shares = smallest + (1 - smallest) * torch.rand(2)
    height, width = (max(1, math.ceil(side * share)) for side, share in zip(image.shape[1:], shares, strict=True))
    top = int(torch.randint(image.shape[1] - height + 1, ()))
    left = int(torch.randint(image.shape[2] - width + 1, ()))
    return crop(image, boxes, top, left, height, width)


def _tracked(image: Tensor, boxes: ImageBoxes) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(
        boxes.boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=tuple(image.shape[-2:])
    )


def _plain(boxes: tv_tensors.BoundingBoxes) -> Tensor:
    plain: Tensor = boxes.as_subclass(Tensor)
    return plain


def _extent(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
