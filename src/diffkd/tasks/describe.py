"""Python values as plain ones: a run started from Python leaves the same records as one from the command line."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import nn


def describe(value: Any) -> Any:
    """Return `value` in numbers, text, lists and mappings.

    Partial calls, data modules and other objects become `{"class_path": ..., "init_args": ...}` as the command line
    writes them, with the arguments that can be found out: those that a data module has saved as its hyperparameters, or
    has as attributes of the same names.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [describe(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, functools.partial):
        return {"class_path": class_path(value.func), "init_args": describe(value.keywords)}
    if isinstance(value, LightningDataModule):
        names = list(inspect.signature(type(value)).parameters)
        known = {name: getattr(value, name) for name in names if hasattr(value, name)}
        known |= {name: value.hparams[name] for name in names if name in value.hparams}
        return {"class_path": class_path(type(value)), "init_args": describe(known)}
    if callable(value) and not isinstance(value, nn.Module):
        return {"class_path": class_path(value)}
    return {"class_path": class_path(type(value))}


def class_path(thing: Any) -> str:
    """Return the dotted name of a class or function."""
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def factory_of(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory in which the class it builds is visible.

    The command line's parser wraps a class into helpers of its own, behind which nobody finds the class's attributes,
    such as what a method wants to be paired with.
    """
    if isinstance(factory, functools.partial):
        classes = [argument for argument in factory.args if isinstance(argument, type)]
        if len(classes) == 1:
            return functools.partial(classes[0], **factory.keywords)
    return factory
