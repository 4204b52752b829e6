"""Whole trainings for tests: data that can interrupt them, and `fit` with values that make them short."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from diffkd import DiffKD
from diffkd.data import Arrays, Augmentation
from diffkd.files.weights import read_weights
from diffkd.training.build import build_training
from diffkd.training.fit import fit
from diffkd.training.lightning_module import Training
from diffkd.training.options import FitOptions


class Tripping(Arrays):
    """Arrays that call something just before the given batch of the training is handed out."""

    def __init__(self, *args: Any, trip: int, action: Callable[[], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self.trip, self.action = trip, action

    def train_dataloader(self) -> Any:
        return Tripwire(super().train_dataloader(), self.trip, self.action)


class Tripwire:
    """A loader that calls something just before its given batch."""

    def __init__(self, loader: Any, trip: int, action: Callable[[], None]) -> None:
        self.loader, self.sampler, self.batch_sampler = loader, loader.sampler, None
        self.digest, self.image_digest = loader.digest, getattr(loader, "image_digest", None)
        self.trip, self.action, self.handed_out = trip, action, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if self.handed_out == self.trip:
                self.action()
            self.handed_out += 1
            yield batch


def signal_self(signum: int) -> Callable[[], None]:
    return functools.partial(os.kill, os.getpid(), signum)


def fail() -> None:
    raise ConnectionError("the power is off")


def arrays(files: dict[str, str], trip: int | None = None, action: Callable[[], None] = fail, **options: Any) -> Arrays:
    """Batches of 10: 6 a epoch."""
    options = {"batch_size": 10, "augmentation": Augmentation(crop_padding=1, flip=True)} | options
    if trip is None:
        return Arrays(files["train"], files["test"], **options)
    return Tripping(files["train"], files["test"], trip=trip, action=action, **options)


def train(data: Any, out: Path, models: str, **options: Any) -> dict[str, Any]:
    """Train `small` for three epochs, alone, or taught by an untrained `large`."""
    method = options.pop("method", None)
    teacher = {"teacher": f"{models}:large", "method": method} if method else {}
    defaults = {"epochs": 3, "progress": False, "config": {"same": True}, "accelerator": "cpu", "log_every": 4}
    return fit(f"{models}:small", data, out, **(defaults | teacher | options))


def built(student: str, data: Any, **options: Any) -> Training:
    """Build what `fit` would train."""
    return build_training(FitOptions(student, "unused", **options), data)


def same_weights(first: Path, second: Path) -> bool:
    one, other = read_weights(first), read_weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


METHODS = {"plain": None, "diffkd": functools.partial(DiffKD, ae_channels=6)}
