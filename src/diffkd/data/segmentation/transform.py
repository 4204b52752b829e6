"""Joint augmentation and normalisation of image and mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Options of the joint augmentation of training images and masks; the default changes nothing.

    The order is: scale, random crop to the data module's `crop_size`, flip, colour jitter, normalisation, padding if
    the scaled image is smaller than the crop: the image with 0 (the mean), the mask with the ignored id.

    Args:
        scale: smallest and largest factor of the random scale, drawn uniformly; (1, 1) is off, (0.5, 2) is usual.
            Images are resized bilinearly with antialiasing, masks by the nearest pixel.
        flip: mirror left to right with probability 1/2.
        color_jitter: largest relative change of brightness, contrast and saturation, each drawn from
            [1 - color_jitter, 1 + color_jitter]; 0 is off, 0.5 is usual.
        hue: largest shift of the hue, as a fraction of the colour circle; 0 is off, 0.07 is usual.
        max_class_share: largest share of the labelled pixels of a crop that one class may have; a crop above it is
            drawn again, ten times at most. 1 is off, 0.75 is usual.

    Raises:
        ValueError: if a value is out of its range.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    color_jitter: float = 0.0
    hue: float = 0.0
    max_class_share: float = 1.0

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < float("inf"):
            raise ValueError(
                f"augmentation scale={self.scale} is not a range of factors: give (smallest, largest), both above 0."
            )
        object.__setattr__(self, "scale", (float(self.scale[0]), float(self.scale[1])))
        for name, limit in (("color_jitter", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"augmentation {name}={getattr(self, name)} is out of range: give 0 (off) to {limit}.")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(
                f"augmentation max_class_share={self.max_class_share} is out of range: give above 0, and 1 for off."
            )


_CROPS = 10  # largest number of draws for `max_class_share`


@dataclass(frozen=True)
class TrainTransform:
    """Augment an image and its mask by `SegmentationAugmentation`, and crop or pad both to one size.

    Draws from the global CPU generator, as torchvision's transforms do.

    Args:
        augmentation: the options.
        crop_size: (H, W) of the result, in pixels.
        ignore_index: the id of ignored pixels; the mask is padded with it.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].
    """

    augmentation: SegmentationAugmentation
    crop_size: tuple[int, int]
    ignore_index: int
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return image (3, H, W) float32 and mask (H, W) int64 at `crop_size`, given (3, h, w) uint8 and (h, w)."""
        augmentation = self.augmentation
        pair: tuple[Tensor, Tensor] = tv_tensors.Image(image), tv_tensors.Mask(mask)
        low, high = augmentation.scale
        if low < 1 or high > 1:
            factor = low + (high - low) * torch.rand(()).item()
            height, width = (max(round(side * factor), 1) for side in mask.shape)
            pair = resized(*pair, (height, width))
        pair = self._cropped(*pair)
        if augmentation.flip and torch.rand(()).item() < 0.5:
            pair = functional.horizontal_flip(pair[0]), functional.horizontal_flip(pair[1])
        jitter = augmentation.color_jitter
        if jitter or augmentation.hue:
            pair = v2.ColorJitter(jitter, jitter, jitter, augmentation.hue)(*pair)
        return padded(*normalised(*pair, self.mean, self.std), self.crop_size, self.ignore_index)

    def _cropped(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        height, width = (min(side, crop) for side, crop in zip(mask.shape, self.crop_size, strict=True))
        share = self.augmentation.max_class_share
        for _ in range(_CROPS if share < 1 else 1):
            top = int(torch.randint(mask.shape[0] - height + 1, ()))
            left = int(torch.randint(mask.shape[1] - width + 1, ()))
            part = functional.crop(mask, top, left, height, width)
            if share == 1 or self._largest_share(part) <= share:
                break
        return functional.crop(image, top, left, height, width), part

    def _largest_share(self, mask: Tensor) -> float:
        labelled = mask[mask != self.ignore_index]
        if not labelled.numel():
            return 1.0
        return int(labelled.bincount().max()) / labelled.numel()


@dataclass(frozen=True)
class EvalTransform:
    """Normalise an image without cropping; the mask is not changed.

    Args:
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return image (3, h, w) float32 and mask int64, given (3, h, w) uint8 and a mask of any size."""
        return normalised(image, mask, self.mean, self.std)


def resized(image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize an image (3, h, w) bilinearly with antialiasing, and a mask (h, w) by the nearest pixel, to (H, W)."""
    if tuple(image.shape[-2:]) != size:
        image = _resized_image(image, size)
    return image, resized_mask(mask, size)


def _resized_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    # Torch gives wrong results for a single column, unless the memory format is channels last.
    given = image[None].contiguous(memory_format=torch.channels_last)[0] if size[1] == 1 else image
    moved: Tensor = functional.resize(tv_tensors.Image(given), list(size), antialias=True)
    return moved


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a mask (h, w) to (H, W).

    Each pixel takes the value nearest to its centre. Torch's older "nearest" samples at corners, half a pixel off the
    bilinear image.
    """
    if tuple(mask.shape) == size:
        return mask
    # As an image, since older torchvision (0.26) always samples masks at corners, whatever the interpolation mode.
    exact = v2.InterpolationMode.NEAREST_EXACT
    moved: Tensor = functional.resize_image(mask.as_subclass(Tensor)[None], list(size), interpolation=exact)
    resized: Tensor = tv_tensors.Mask(moved[0])
    return resized


def normalised(image: Tensor, mask: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return tensors: the uint8 image as float32, scaled to [0, 1] and normalised, and the mask as int64."""
    floats = functional.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True)
    return functional.normalize(floats, list(mean), list(std)), mask.as_subclass(Tensor).to(torch.int64)


def padded(image: Tensor, mask: Tensor, size: tuple[int, int], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Pad at the right and at the bottom up to (H, W): the image with 0, the mask with the ignored id."""
    bottom, right = (max(side - old, 0) for side, old in zip(size, mask.shape, strict=True))
    if not bottom and not right:
        return image, mask
    sides = (0, right, 0, bottom)
    pad = torch.nn.functional.pad
    return pad(image, sides), pad(mask, sides, value=ignore_index)


def fitted(image: Tensor, mask: Tensor, size: tuple[int, int], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Centre-crop or pad a normalised image and its mask to (H, W)."""
    height, width = (min(old, side) for old, side in zip(mask.shape, size, strict=True))
    top, left = (mask.shape[0] - height) // 2, (mask.shape[1] - width) // 2
    window = slice(top, top + height), slice(left, left + width)
    return padded(image[:, *window], mask[window], size, ignore_index)
