"""Calling of a model: input as tensor, tuple or mapping; training mode; device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def run(model: nn.Module, inputs: Any) -> Any:
    """Call `model` with a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` into evaluation mode inside this context, then restore each one's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def with_tensors(example: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in a model's input; tuples, lists and mappings are kept."""
    if isinstance(example, Tensor):
        return change(example)
    if isinstance(example, Mapping):
        return {key: with_tensors(value, change) for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        values = [with_tensors(value, change) for value in example]
        return type(example)(*values) if hasattr(example, "_fields") else type(example)(values)
    return example


def first_parameter(model: nn.Module) -> nn.Parameter | None:
    """Return the first parameter of a model, which represents its device and dtype; None if it has none."""
    for parameter in model.parameters():  # the compiler of PyTorch 2.8 does not follow next(..., None)
        return parameter
    return None


def on_device_of(model: nn.Module, example: Any) -> Any:
    """Return `example` on the model's device, with floating-point tensors in the model's dtype."""
    parameter = first_parameter(model)
    if parameter is None:
        return example
    device, dtype = parameter.device, parameter.dtype
    return with_tensors(example, lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))


def _tensors(example: Any) -> list[Tensor]:
    if isinstance(example, Tensor):
        return [example]
    values = example.values() if isinstance(example, Mapping) else example if isinstance(example, (tuple, list)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def input_size_of(example: Any) -> tuple[int, int] | None:
    """Return (H, W) of the first image in a model's input, None if there is none."""
    for tensor in _tensors(example):
        if tensor.ndim >= 3:
            return tensor.shape[-2], tensor.shape[-1]
    return None


def batch_of(example: Any) -> int | None:
    """Return B of the first batch of images (B, C, H, W) in a model's input, None if there is none."""
    return next((len(tensor) for tensor in _tensors(example) if tensor.ndim == 4), None)


def shapes_of(example: Any) -> str:
    """Return the shapes of a model's input as text."""
    return ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(example)) or type(example).__name__
