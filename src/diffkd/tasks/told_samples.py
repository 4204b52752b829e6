"""Methods that keep something of every training image are told how many there are."""

import inspect
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import nn

from diffkd.tasks.describe import factory_of
from diffkd.tasks.same_data import describe_samples


def tell_samples(method: Any, data: LightningDataModule) -> Any:
    """Return a method's factory with `samples` set to the number of training images, if it takes and wants that.

    Those that need "indices" and have an argument `samples` do; None there asks for the data's number.

    Args:
        method: a factory, or a method, which is returned as it is.
        data: says how many there are.

    Raises:
        ValueError: if it was told another number.
    """
    if method is None or isinstance(method, nn.Module):
        return method
    method = factory_of(method)
    kind = method.func if isinstance(method, partial) else method
    samples = inspect.signature(method).parameters.get("samples")
    needs = getattr(kind, "needs", ())
    if samples is None or isinstance(needs, property) or "indices" not in needs:
        return method
    count = describe_samples(data.train_dataloader())["training images"]
    if count is None or samples.default == count:
        return method
    if samples.default is not None:
        raise ValueError(
            f"{kind.__name__} is told of {samples.default} training images by samples, but the data have {count}: "
            f"leave --method.samples out, or give {count}"
        )
    return partial(method, samples=count)
