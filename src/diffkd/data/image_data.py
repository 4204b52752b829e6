"""Base of all data modules: loaders over the splits, and the data's properties that models are built from."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from diffkd.data.sampler import EpochSampler

_T = TypeVar("_T")


class Loader(Protocol):
    """Batches of one split, in an order that is a function of seed and epoch."""

    @property
    def sampler(self) -> EpochSampler:
        """The order of the samples; the trainer sets its epoch."""

    @property
    def digest(self) -> str | None:
        """A text that differs if the samples differ; None if it cannot be computed."""

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the batches of one epoch."""


class Loaders(Protocol):
    """Makes loaders over the splits of one data set, with batches on the trainer's device where possible."""

    def train_loader(self, trainer: Trainer | None, start_batch: int = 0) -> Loader:
        """Return shuffled, augmented training batches; the first epoch begins at `start_batch`."""

    def val_loader(self, trainer: Trainer | None) -> Loader:
        """Return the batches of the evaluation images, in order, each image exactly once over all ranks."""

    def test_loader(self, trainer: Trainer | None) -> Loader:
        """Return the batches of the test images, in order, each image exactly once over all ranks."""

    def example(self) -> Any:
        """Return two training images, preprocessed as model input, on the CPU."""


class ImageData(LightningDataModule):
    """A data module that delegates its loaders to `loaders` and records classes, image size and normalisation.

    Args:
        loaders: makes the loaders.
        classes: names of the K classes.
        image_size: (H, W) in pixels.
        mean: mean of the normalisation per channel, in units of [0, 1]; the default does not normalise, for detectors,
            which normalise their input themselves.
        std: standard deviation, likewise.
        labels: False: the data are for representations, which are distilled without labels.

    If the constructor of a subclass passes `**options` to its base, its signature also lists the base's arguments. The
    record of a run, the `test` command and `help()` read that signature.

    Attributes:
        start_batch: batches that the first training epoch skips; set when a run resumes in mid-epoch.
        pixel_unit: the value of white, in which `mean` and `std` are given: 1, or 255 for floats in [0, 255]; None for
            floats that are no pixels.
    """

    __signature__: ClassVar[inspect.Signature]
    pixel_unit: float | None = 1.0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__signature__ = _whole_signature(cls)

    def __init__(
        self,
        loaders: Loaders,
        classes: Sequence[str],
        *,
        image_size: tuple[int, int],
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        labels: bool = True,
    ) -> None:
        super().__init__()
        self._loaders = loaders
        self.classes = tuple(classes) if labels else ()
        if not labels:
            self.task = "representation"
        self.has_probe = not labels and len(classes) > 1
        if not labels and not self.has_probe:
            rank_zero_warn(
                f"all images are of one class ({', '.join(classes)}), among which every neighbour is right: there is "
                "no probe; give images of two classes or more to measure the student by their labels"
            )
        self.num_classes = len(self.classes)
        self.in_channels = len(mean)
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.start_batch = 0

    def train_dataloader(self) -> Loader:
        """Return shuffled, augmented training batches; the first epoch begins at `start_batch`."""
        return self._loaders.train_loader(self.trainer, self.start_batch)

    def val_dataloader(self) -> Loader:
        """Return the batches of the evaluation images, each image exactly once."""
        return self._loaders.val_loader(self.trainer)

    def test_dataloader(self) -> Loader:
        """Return the batches of the test images, or of the evaluation images without a test split, each image once."""
        return self._loaders.test_loader(self.trainer)

    def example(self) -> Any:
        """Return two training images on the CPU: (2, C, H, W) float32, normalised.

        For detection, a list of two (3, H, W) float32 in [0, 1], which may differ in size.
        """
        return self._loaders.example()


# The classes of the student that is evaluated; None while something is trained.
_EVALUATED_CLASSES: ContextVar[tuple[str, ...] | None] = ContextVar("evaluated_classes", default=None)


@contextmanager
def allow_missing_training_images(classes: Sequence[str] = ()) -> Iterator[None]:
    """Within this context, data modules without training images use the evaluation images in their place.

    Args:
        classes: names of the classes of the student that is evaluated, in its order, since evaluation images may be of
            some of them only; () if they are unknown.
    """
    token = _EVALUATED_CLASSES.set(tuple(map(str, classes)))
    try:
        yield
    finally:
        _EVALUATED_CLASSES.reset(token)


def evaluated_classes(found: Sequence[str]) -> tuple[str, ...]:
    """Return the classes of the student that is evaluated, if they include all that were found; else those found."""
    known = _EVALUATED_CLASSES.get() or ()
    return known if set(found) <= set(known) else tuple(found)


def train_or_val(train: Callable[[], _T], val: Callable[[], _T]) -> tuple[_T, bool]:
    """Read the training images, or the evaluation images if the former are missing and nothing will be trained.

    Args:
        train: reads the training images.
        val: reads the evaluation images.

    Returns:
        The images read, and whether they are the training images.
    """
    try:
        return train(), True
    except FileNotFoundError as missing:
        if _EVALUATED_CLASSES.get() is None:
            raise
        try:
            return val(), False
        except FileNotFoundError:
            raise missing from None


def val_or_hint(val: Callable[[], _T]) -> _T:
    """Read the evaluation images; if they are missing, the message names the option that does without them."""
    try:
        return val()
    except FileNotFoundError as error:
        text = str(error).rstrip(".")
        raise FileNotFoundError(f"{text}, or set val_share=0.1 to hold some of the training images back.") from error


def _whole_signature(cls: type) -> inspect.Signature:
    """Return the signature of a class, with `**options` replaced by the arguments of its base.

    Positional-only arguments of the base are left out: the subclass passes them, not the user.
    """
    _self, *own = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    if not own or own[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return inspect.Signature(own)
    base = next(one for one in cls.__mro__[1:] if "__init__" in vars(one))
    known = {parameter.name for parameter in own}
    passed = [
        parameter if parameter.kind is inspect.Parameter.VAR_KEYWORD else parameter.replace(kind=_BY_NAME)
        for parameter in inspect.signature(base).parameters.values()
        if parameter.name not in known - {own[-1].name} and parameter.kind not in _NOT_BY_NAME
    ]
    return inspect.Signature([*own[:-1], *passed])


_BY_NAME = inspect.Parameter.KEYWORD_ONLY
_NOT_BY_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


@dataclass(frozen=True)
class Placement:
    """Device and rank of one process.

    Args:
        device: device of the model.
        rank: rank of this process in [0, world_size).
        world_size: number of processes.
    """

    device: torch.device
    rank: int
    world_size: int


def placement(trainer: Trainer | None) -> Placement:
    """Return the trainer's device, rank and world size; without a trainer the CPU, 0 and 1."""
    if trainer is None:
        return Placement(torch.device("cpu"), rank=0, world_size=1)
    return Placement(trainer.strategy.root_device, rank=trainer.global_rank, world_size=trainer.world_size)
