"""Properties of the data that models and tasks need, and checks that a resumed run has the same data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from diffkd.files.config import differences

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

TaskName = Literal["classification", "detection", "segmentation", "representation"]


@dataclass(frozen=True)
class DataFacts:
    """Properties of images and labels from which models and tasks are built.

    Args:
        num_classes: K.
        in_channels: C of the images.
        image_size: (H, W) in pixels.
        mean: per channel, of the normalisation, in units of [0, 1], unless there is no `pixel_unit`.
        std: likewise.
        classes: names of the classes, K of them.
        example: two images (2, C, H, W), normalised; for detection a list of two (C, H, W) in [0, 1].
        mixup: alpha of Mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        task: what the data are for.
        ignore_index: id in masks that is ignored in loss and metrics.
        min_size: for detection, the shorter side that images are resized to, one of these at random in training.
        max_size: for detection, the upper limit of the longer side.
        batch_size: training images in a batch; None: unknown.
        probe: for representations, whether labelled images come with the evaluation batches.
        multi_label: whether an image may have several classes; labels are (B, K) zeros and ones then.
        pixel_unit: the value of white in the data's own images; None if they are floats that are no pixels.
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
    probe: bool = False
    multi_label: bool = False
    pixel_unit: float | None = 1.0


def facts_of(data: "LightningDataModule") -> DataFacts:
    """Read the properties of a data module.

    Raises:
        ValueError: if it lacks `num_classes`, `in_channels`, `image_size`, `mean`, `std`, `classes` or `example()`, or
            its `task` is unknown.
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
    mean, std = (tuple(float(value) for value in found[name]) for name in ("mean", "std"))
    # A mean above 1 of data that do not state their unit is not of pixels in [0, 1].
    unit = getattr(data, "pixel_unit", 1.0 if max(mean, default=0.0) <= 1 else None)
    return DataFacts(
        num_classes=int(found["num_classes"]),
        in_channels=int(found["in_channels"]),
        image_size=tuple(int(side) for side in found["image_size"]),
        mean=tuple(value / (unit or 1.0) for value in mean),
        std=tuple(value / (unit or 1.0) for value in std),
        classes=tuple(str(name) for name in found["classes"]),
        example=found["example"](),
        mixup=float(getattr(augmentation, "mixup", 0.0)),
        cutmix=float(getattr(augmentation, "cutmix", 0.0)),
        task=task,
        ignore_index=int(getattr(data, "ignore_index", 255)),
        min_size=(int(min_size),) if isinstance(min_size, int) else tuple(int(side) for side in min_size),
        max_size=int(getattr(data, "max_size", 1333)),
        batch_size=getattr(data, "batch_size", None),
        probe=bool(getattr(data, "has_probe", False)),
        multi_label=bool(getattr(data, "multi_label", False)),
        pixel_unit=unit,
    )


def check_unit(scaled: bool | None, data: DataFacts, model: str) -> None:
    """Raise ValueError if a model was trained on pixels and the data are other floats, or the other way round.

    Args:
        scaled: whether mean and std of its normalisation are in units of [0, 1]; None: unknown, which is not checked.
        data: the facts of the data that it is to see.
        model: what it is, for the message.
    """
    if scaled is not None and scaled != (data.pixel_unit is not None):
        learned, given = "pixels", "floats that are no pixels in [0, 1] or [0, 255]"
        if not scaled:
            learned, given = given, learned
        raise ValueError(f"{model} was trained on {learned}, the data are {given}: give data as in its training")


def describe_samples(loader: Any) -> dict[str, Any]:
    """Return properties of a loader's samples that need no reading of images, None if unknown.

    Returns:
        "training images": their number; "digest": of their names and labels in order.
    """
    dataset: Any = getattr(loader, "dataset", None)
    size = len(dataset) if hasattr(dataset, "__len__") else None
    size = getattr(getattr(loader, "sampler", None), "size", size)
    return {"training images": size, "digest": getattr(loader, "digest", None)}


def check_samples(stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise ValueError if the samples differ from those at the start of the run, as far as both are known."""
    known = [name for name in stored if stored[name] is not None and given.get(name) is not None]
    found = differences({name: stored[name] for name in known}, {name: given[name] for name in known})
    if found:
        what = "other names or labels" if found[0].startswith("digest") else found[0]
        raise ValueError(
            f"the data are not those that the run began with ({what}), and their samples would be taken for others: "
            "bring the data back, or give another --out"
        )


def check_classes(stored: Sequence[str], given: Sequence[str]) -> None:
    """Raise ValueError if the classes differ from those at the start of the run; names the first that differs."""
    if (other := first_difference(stored, given)) is not None:
        raise ValueError(
            f"the data have other classes than the run began with: {other}. Name them as they were, or give another "
            "--out"
        )


def first_difference(there: Sequence[str], here: Sequence[str]) -> str | None:
    """Return the first class in which two lists of names differ.

    >>> first_difference(["cat", "dog"], ["cat", "fox"])
    "class 1 is 'dog' there, 'fox' here"
    """
    ours, theirs = ({f"class {index}": str(name) for index, name in enumerate(names)} for names in (here, there))
    return next(iter(differences(theirs, ours)), None)
