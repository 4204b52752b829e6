"""What is done to training images: one typed, frozen description for every data module."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Augmentation:
    """Say how training images are augmented; the default changes nothing.

    The order is: crop, flip, RandAugment, colour jitter, normalisation, random erasing. Mixup and CutMix need pairs of
    images and soft labels and are applied to whole batches by the task (`diffkd.data.mix`).

    Args:
        crop_padding: pixels of zeros added on each side before a random crop back to the image's size; 0 is off. For
            images in memory; folders crop by `ImageFolder(min_crop_area=...)`.
        flip: mirror left to right with probability 1/2.
        rand_augment: RandAugment operations per image (Cubuk et al., 2020); 0 is off, 2 is usual.
        rand_augment_magnitude: their strength on a scale of 0 to 30; 9 is usual.
        color_jitter: largest relative change of brightness, contrast and saturation, each drawn from
            [1 - color_jitter, 1 + color_jitter]; 0 is off, 0.4 is usual.
        random_erasing: probability that a rectangle of 2 % to 33 % of an image is filled with normal noise after
            normalisation (Zhong et al., 2020); 0 is off.
        mixup: alpha of the Beta(alpha, alpha) from which Mixup draws its weight (Zhang et al., 2018); 0 is off.
        cutmix: alpha of the Beta(alpha, alpha) from which CutMix draws its area (Yun et al., 2019); 0 is off. With both
            Mixup and CutMix on, each batch takes one of them with probability 1/2.

    Raises:
        ValueError: if a value is out of its range.
    """

    crop_padding: int = 0
    flip: bool = False
    rand_augment: int = 0
    rand_augment_magnitude: int = 9
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "crop_padding": float("inf"),
            "rand_augment": float("inf"),
            "rand_augment_magnitude": 30,
            "color_jitter": 1,
            "random_erasing": 1,
            "mixup": float("inf"),
            "cutmix": float("inf"),
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise ValueError(f"augmentation {name}={value} is out of range: give 0 (off) to {limit}.")
