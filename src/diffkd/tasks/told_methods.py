"""Methods that must know the data's number of images or classes are told."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import nn

from diffkd.tasks.describe import factory_of
from diffkd.tasks.same_data import describe_samples
from diffkd.tasks.served import inner_methods

# Arguments, and what a method that means them by these names needs.
_TOLD = {"samples": "indices", "classes": "labels"}


def tell_data(method: Any, data: LightningDataModule) -> Any:
    """Return a method's factory with `samples` and `classes` set to the numbers of the data, if it wants that.

    Those that need "indices" and have an argument `samples` do, and those that need "labels" and have an argument
    `classes`; None there asks for the data's number. So do methods inside of another, as of
    :class:`~diffkd.Shared`.

    Args:
        method: a factory, or a method, which is returned as it is.
        data: says how many there are.

    Raises:
        ValueError: if it was told another number of images, or of fewer classes.
    """
    if method is None or isinstance(method, nn.Module):
        return method
    method = factory_of(method)
    inner = {name: tell_data(one, data) for name, one in inner_methods(method).items()}
    told = {name: value for name, need in _TOLD.items() if (value := _value(method, name, need, data)) is not None}
    return partial(method, **inner, **told) if inner or told else method


def _value(method: Callable[..., Any], name: str, need: str, data: LightningDataModule) -> int | None:
    """Return what to give a method for its argument `name`; None if nothing."""
    kind = method.func if isinstance(method, partial) else method
    argument = inspect.signature(method).parameters.get(name)
    needs = getattr(kind, "needs", ())
    if argument is None or isinstance(needs, property) or need not in needs:
        return None
    count = describe_samples(data.train_dataloader())["training images"] if name == "samples" else _classes(data)
    given = argument.default
    if count is None or given == count or given is inspect.Parameter.empty:
        return None
    if given is None:
        return count
    if name == "classes" and given > count:
        return None  # room for more than there are
    what = "training images" if name == "samples" else "classes"
    raise ValueError(
        f"{kind.__name__} is told of {given} {what} by {name}, but the data have {count}: "
        f"leave --method.{name} out, or give {count}"
    )


def _classes(data: LightningDataModule) -> int | None:
    count = getattr(data, "num_classes", None)
    return None if count is None else int(count)
