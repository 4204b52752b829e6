"""What is done to training images of segmentation: one typed, frozen description for every data module."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Say how training images and their masks are augmented together; the default changes nothing.

    The order is: scale, random crop to the data module's `crop_size`, flip, colour jitter, normalisation, padding
    where the scaled image is smaller than the crop: the image with 0, its mean, and the mask with the ignored id.

    Args:
        scale: smallest and largest factor of the random scale, drawn evenly; (1, 1) is off, (0.5, 2) is usual. Images
            are resized bilinearly with antialiasing, masks by the nearest pixel.
        flip: mirror left to right with probability 1/2.
        color_jitter: largest relative change of brightness, contrast and saturation, each drawn from
            [1 - color_jitter, 1 + color_jitter]; 0 is off, 0.5 is usual.
        hue: largest turn of the hue, as a fraction of the colour circle; 0 is off, 0.07 is usual.
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
