"""The rest of a teacher after a layer, for methods that apply it to the student's feature."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffkd.features.forward import first_parameter, on_device_of, run
from diffkd.files.weights import unwrap

Head = Callable[[Tensor], Tensor]
# Largest error of a head, as a share of the range of the teacher's scores, in single and in half precision. Folding and
# other orders of summation stay far below; what leaves a normalisation out, or takes another pooling, is far above.
_TOLERANCE, _HALF_TOLERANCE = 1e-2, 5e-2


def rest_of(teacher: nn.Module, layer: str, example: Any, feature: Tensor, scores: Tensor) -> Head:
    """Return what the teacher computes from a layer's feature, as a function from the feature to its class scores.

    It is the modules that run after the layer, in their order, or average pooling and the last linear layer, whichever
    gives the teacher's own scores for the example. Gradients flow to the feature, not to the teacher's parameters.

    Args:
        teacher: a classifier in evaluation mode.
        layer: name of the layer, without selector.
        example: the teacher's input.
        feature: the layer's feature for the example as methods get it, (B, C, H, W) or (B, C).
        scores: the teacher's scores for the example, (B, K).

    Returns:
        A function from (B, C, H, W) or (B, C) to scores (B, K) of the feature's dtype.

    Raises:
        ValueError: if neither gives the teacher's scores.
    """
    linears = [module for module in unwrap(teacher).modules() if isinstance(module, nn.Linear)]
    found = [_Chain(modules)] if (modules := _modules_after(teacher, layer, example)) else []
    if linears and linears[-1].in_features == feature.shape[1]:
        found.append(_Chain([_Pool(), linears[-1]]))
    for head in found:
        if _gives(head, feature, scores):
            return head
    if not linears:
        why = "the teacher's last linear layer is missing"
    elif linears[-1].in_features != feature.shape[1]:
        takes = linears[-1].in_features
        why = f"the teacher's last linear layer takes {takes}, but the feature has {feature.shape[1]} channels"
    else:
        why = (
            f"the teacher computes more from '{layer}' than its modules and its last linear layer show, such as a "
            "class token or an activation between them, so its scores cannot be had from that feature"
        )
    raise ValueError(
        f"{why}: hand the method a teacher_head, a function from the feature to logits, with "
        "distiller(images, teacher_head=...)"
    )


def _gives(head: Head, feature: Tensor, scores: Tensor) -> bool:
    """Whether a head gives the teacher's scores, up to rounding."""
    with torch.no_grad():
        try:
            made = head(feature)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # its modules do not fit together, since functions ran between them
    if not isinstance(made, Tensor) or made.shape != scores.shape:
        return False
    wanted = scores.double()
    span = (wanted - wanted.mean()).abs().max()
    tolerance = _TOLERANCE if scores.dtype.itemsize >= 4 else _HALF_TOLERANCE
    return bool((made.double() - wanted).abs().max() <= tolerance * span + torch.finfo(torch.float32).eps)


class _Pool(nn.Module):
    def forward(self, feature: Tensor) -> Tensor:
        return feature.flatten(2).mean(2) if feature.ndim == 4 else feature


class _Chain:
    """Modules in sequence, their parameters constant; a linear layer gets maps flattened, as every classifier does."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.flattens = [isinstance(next(_leaves(module)), nn.Linear) for module in modules]

    def __call__(self, feature: Tensor) -> Tensor:
        x = feature
        for module, flattens in zip(self.modules, self.flattens, strict=True):
            if flattens and x.ndim == 4:
                x = x.flatten(1)
            if (parameter := first_parameter(module)) is None:
                x = module(x)
            else:
                constant = {name: one.detach() for name, one in module.named_parameters()}
                x = functional_call(module, constant, (x.to(parameter.dtype),))
        return x.to(feature.dtype)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    return (one for one in module.modules() if not any(True for _ in one.children()))


def _modules_after(teacher: nn.Module, layer: str, example: Any) -> list[nn.Module]:
    """Return the outermost modules that a forward starts after a layer has finished, in their order."""
    model = unwrap(teacher)
    start = dict(model.named_modules()).get(layer)
    if start is None:
        return []
    after: list[nn.Module] = []
    running: list[nn.Module] = []  # of `after`, those that have not finished
    state = {"finished": False}

    def entering(module: nn.Module, _: Any) -> None:
        if state["finished"] and not running:
            after.append(module)
        if state["finished"]:
            running.append(module)

    def leaving(module: nn.Module, _: Any, __: Any) -> None:
        if module is start:
            state["finished"] = True
            after.clear()
            running.clear()
        elif running and running[-1] is module:
            running.pop()

    handles = [
        handle
        for module in model.modules()
        for handle in (module.register_forward_pre_hook(entering), module.register_forward_hook(leaving))
    ]
    try:
        with torch.no_grad():
            run(model, on_device_of(model, example))
    finally:
        for handle in handles:
            handle.remove()
    return after
