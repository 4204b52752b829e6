"""The config of a run: Python values as plain data, and the differences between two configs."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn


def describe(value: Any) -> Any:
    """Return `value` as numbers, strings, lists and mappings.

    Partial calls, data modules and other objects become `{"class_path": ..., "init_args": ...}`, as on the command
    line. Arguments of a data module are its saved hyperparameters, or attributes of the same names.
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
    if not isinstance(value, (nn.Module, type)) and (saved := getattr(value, "hparams", None)) is not None:
        names = list(inspect.signature(type(value)).parameters)
        known = {name: getattr(value, name) for name in names if hasattr(value, name)}
        known |= {name: saved[name] for name in names if name in saved}
        return {"class_path": class_path(type(value)), "init_args": describe(known)}
    if callable(value) and not isinstance(value, nn.Module):
        return {"class_path": class_path(value)}
    return {"class_path": class_path(type(value))}


def class_path(thing: Any) -> str:
    """Return the dotted name of a class or function."""
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def unwrap_factory(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Unwrap a factory of the command line's parser, so that the class it builds is accessible.

    The parser's wrappers hide class attributes, such as the kind of features that a method needs.
    """
    if isinstance(factory, functools.partial):
        classes = [argument for argument in factory.args if isinstance(argument, type)]
        if len(classes) == 1:
            return functools.partial(classes[0], **factory.keywords)
    return factory


def differences(
    stored: Any, given: Any, name: str = "", *, same: Callable[[Any, Any], bool] = operator.eq
) -> list[str]:
    """List the differences between two nested mappings.

    Args:
        stored: what was recorded.
        given: the mapping to compare with. A missing key counts as None, which equals a switch that is off: the version
            that wrote that side may not have had the switch.
        name: prefix of the dotted names.
        same: equality of two values that are not both mappings.

    >>> differences({"data": {"seed": 0}}, {"data": {"seed": 1}})
    ['data.seed is 0 there, 1 here']
    """
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        keys = [*stored, *(key for key in given if key not in stored)]
        lacking_off = {
            key
            for one, other in ((stored, given), (given, stored))
            for key in one
            if one[key] is False and key not in other
        }
        parts = (
            differences(stored.get(key), given.get(key), f"{name}.{key}" if name else str(key), same=same)
            for key in keys
            if key not in lacking_off
        )
        return [one for part in parts for one in part]
    return [] if same(stored, given) else [f"{name} is {stored!r} there, {given!r} here"]
