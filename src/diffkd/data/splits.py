"""Selection of the split to evaluate on, and its name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from diffkd.data.classification.image_folder import ImageFolder
from diffkd.data.folders import evaluation_split
from diffkd.data.image_data import ImageData
from diffkd.data.loaders import SplitLoaders


def choose_split(data: LightningDataModule, split: str | None = None) -> tuple[str, Callable[[], Any]]:
    """Return the name of the split to evaluate on and a function that makes its loader.

    Args:
        data: the data module.
        split: "test" or "val"; None: test if it exists, otherwise val.

    Raises:
        ValueError: if "test" is requested and does not exist, or its images do not pass the checks of the others.
    """
    name = _name_of_val(data)
    if split == "val" or (name == "test" and isinstance(data, ImageData)):
        return name, data.val_dataloader
    test = _test_loader(data)
    if test is not None:
        return "test", test
    if split == "test":
        raise ValueError(
            f"{type(data).__name__} has no test split with labels: give one by its options, such as --data.test or "
            f"--data.val test, of an ImageFolder as test/<class>/*.jpg, or measure on {name} by --split val"
        )
    return name, data.val_dataloader


def _name_of_val(data: LightningDataModule) -> str:
    if getattr(data, "val_share", None) is not None:
        return "val"  # images held back from training, whatever other folders there are
    if isinstance(data, ImageFolder):
        return evaluation_split(Path(data.root))
    val = getattr(data, "val", None)
    return Path(val).stem if isinstance(val, str) and val else "val"


def _test_loader(data: LightningDataModule) -> Callable[[], Any] | None:
    """Return a function that makes the test loader, None if there are no test images."""
    if not isinstance(data, ImageData):
        own = type(data).test_dataloader is not LightningDataModule.test_dataloader
        return data.test_dataloader if own else None
    loaders: Any = data._loaders
    if getattr(loaders, "test", None) is not None:
        return data.test_dataloader
    if isinstance(data, ImageFolder) and isinstance(loaders, SplitLoaders) and data.classes:
        test = data.read_test()
        if test is not None:
            return lambda: replace(loaders, test=test).test_loader(data.trainer)
    return None
