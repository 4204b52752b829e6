"""What a task must know of the data."""

from dataclasses import dataclass

from lightning.pytorch import LightningDataModule
from torch import Tensor


@dataclass(frozen=True)
class DataFacts:
    """The facts about images and labels that models are built after.

    Args:
        num_classes: K.
        in_channels: C of the images.
        image_size: (H, W) in pixels.
        mean: per channel, of the normalisation, in units of [0, 1].
        std: likewise.
        classes: names of the classes, K of them.
        example: two images (2, C, H, W), normalised.
        mixup: alpha of Mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
    """

    num_classes: int
    in_channels: int
    image_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    example: Tensor
    mixup: float = 0.0
    cutmix: float = 0.0


def facts_of(data: LightningDataModule) -> DataFacts:
    """Read the facts off a data module.

    Raises:
        ValueError: if it lacks `num_classes`, `in_channels`, `image_size`, `mean`, `std`, `classes` or `example()`.
    """
    wanted = ("num_classes", "in_channels", "image_size", "mean", "std", "classes", "example")
    missing = [name for name in wanted if not hasattr(data, name)]
    if missing:
        raise ValueError(
            f"data module {type(data).__name__} has no {', '.join(missing)}; the data modules in diffkd.data show how "
            "one looks that can be trained on"
        )
    found = {name: getattr(data, name) for name in wanted}
    augmentation = getattr(data, "augmentation", None)
    return DataFacts(
        num_classes=int(found["num_classes"]),
        in_channels=int(found["in_channels"]),
        image_size=tuple(int(side) for side in found["image_size"]),
        mean=tuple(float(value) for value in found["mean"]),
        std=tuple(float(value) for value in found["std"]),
        classes=tuple(str(name) for name in found["classes"]),
        example=found["example"](),
        mixup=float(getattr(augmentation, "mixup", 0.0)),
        cutmix=float(getattr(augmentation, "cutmix", 0.0)),
    )
