"""What a task must know of the data."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning.pytorch import LightningDataModule

TaskName = Literal["classification", "detection", "segmentation"]


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
        example: two images (2, C, H, W), normalised; for detection a list of two (C, H, W) in [0, 1].
        mixup: alpha of Mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        task: what the data are for.
        ignore_index: of masks, the id that is neither trained nor measured.
        min_size: for detection, the shorter side that images are resized to, one of these at random in training.
        max_size: for detection, the longest side that they may then have.
        batch_size: training images in a batch; None: unknown.
    """

    num_classes: int
    in_channels: int
    image_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    example: Any
    mixup: float = 0.0
    cutmix: float = 0.0
    task: TaskName = "classification"
    ignore_index: int = 255
    min_size: tuple[int, ...] = (800,)
    max_size: int = 1333
    batch_size: int | None = None


def facts_of(data: LightningDataModule) -> DataFacts:
    """Read the facts off a data module.

    Raises:
        ValueError: if it lacks `num_classes`, `in_channels`, `image_size`, `mean`, `std`, `classes` or `example()`, or
            its `task` is none of this package's.
    """
    wanted = ("num_classes", "in_channels", "image_size", "mean", "std", "classes", "example")
    missing = [name for name in wanted if not hasattr(data, name)]
    if missing:
        raise ValueError(
            f"data module {type(data).__name__} has no {', '.join(missing)}; the data modules in diffkd.data show how "
            "one looks that can be trained on"
        )
    found = {name: getattr(data, name) for name in wanted}
    task: Any = getattr(data, "task", "classification")
    if task not in get_args(TaskName):
        raise ValueError(f"{type(data).__name__}.task is {task!r}; it must be one of {', '.join(get_args(TaskName))}")
    augmentation = getattr(data, "augmentation", None)
    min_size = getattr(data, "min_size", 800)
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
        task=task,
        ignore_index=int(getattr(data, "ignore_index", 255)),
        min_size=(int(min_size),) if isinstance(min_size, int) else tuple(int(side) for side in min_size),
        max_size=int(getattr(data, "max_size", 1333)),
        batch_size=getattr(data, "batch_size", None),
    )
