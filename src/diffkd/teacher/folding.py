"""Folding of BatchNorm into the convolutions before it, for models in evaluation mode."""

import copy
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffkd.features.forward import evaluation_mode, on_device_of, run
from diffkd.files.weights import unwrap

# Subclasses may compute something else, so the forward functions are compared too.
_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fold_batchnorm(
    model: nn.Module, example: Any, *, keep: Collection[str] = ()
) -> tuple[nn.Module, list[tuple[str, str]]]:
    """Return a copy of a model, in evaluation mode, with its BatchNorms folded into the layers before them.

    In evaluation mode BatchNorm is an affine map per channel, which is folded into the weights of the convolution or
    linear layer before (in float64, then rounded to the weights' dtype); an identity replaces it, so that dotted names
    stay. The order of layers is traced in a forward, not guessed from names. A pair is not folded if another operation
    reads the layer's output or the weights, or if one of the two runs more than once, is registered in two places, has
    hooks or parametrisations, or is in `keep`. If the outputs of copy and model for the example differ by more than
    rounding, nothing is folded.

    Args:
        model: is not changed.
        example: its input: a tensor, a tuple of arguments, or a mapping of keyword arguments; moved to its device.
        keep: names of layers whose outputs must not change.

    Returns:
        The copy, and the names of each folded layer and of its BatchNorm.

    Raises:
        ValueError: if the model is compiled already.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> folded, names = fold_batchnorm(model, torch.zeros(2, 3, 8, 8))
        >>> names, folded[1]
        ([('0', '1')], Identity())
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{type(unwrap(model)).__name__} is compiled already, so nothing can be folded in it; give the model itself"
        )
    model = unwrap(model)
    example = on_device_of(model, example)
    with evaluation_mode(model), torch.no_grad():
        found, expected = _pairs(model, example, set(keep))
    folded = copy.deepcopy(model).eval()
    for layer, norm in found:
        _fold(folded, layer, norm)
    if not found or _agrees(folded, example, expected):
        return folded, found
    return copy.deepcopy(model).eval(), []


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's only way to see every operation
    """Records in which of the watched modules each storage is read; "" means elsewhere."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: list[str] = []
        self.readers: defaultdict[int, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self.readers[_storage(one)].add(self.inside[-1] if self.inside else "")
        return func(*args, **kwargs)


def _pairs(model: nn.Module, example: Any, keep: set[str]) -> tuple[list[tuple[str, str]], Any]:
    """Run `model`, and return the names of layers with the BatchNorms to fold into them, and its output."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    modules = {name: module for name, module in model.named_modules() if places[id(module)] == 1 and name}
    layers = {name: module for name, module in modules.items() if _is_layer(module) and _is_plain(module)}
    norms = {name: module for name, module in modules.items() if _is_norm(module) and _is_plain(module)}
    flow = _Flow()
    calls: Counter[str] = Counter()
    made: dict[int, tuple[str, Tensor]] = {}  # by the tensor's id, which is kept alive
    taken: dict[str, str] = {}
    shown: list[Any] = []

    def enter(name: str, module: nn.Module, args: Any) -> None:
        calls[name] += 1
        flow.inside.append(name)
        if name in norms and len(args) == 1 and id(args[0]) in made:
            taken[name] = made[id(args[0])][0]

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        flow.inside.pop()
        if name in layers and isinstance(output, Tensor) and output.ndim == _rank(module):
            flow.readers[_storage(output)] = set()  # the memory may have been reused
            made[id(output)] = (name, output)

    def show(module: nn.Module, args: Any, output: Any) -> None:
        shown.append(output)

    handles = []
    for name in {**layers, **norms}:
        handles.append(modules[name].register_forward_pre_hook(partial(enter, name)))
        handles.append(modules[name].register_forward_hook(partial(leave, name)))
    for name, module in model.named_modules():
        if name in keep or (name not in layers and name not in norms and _has_hooks(module)):
            handles.append(module.register_forward_hook(show))
    try:
        with flow:
            output = run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    seen = {_storage(one) for one in tree_leaves([output, shown]) if isinstance(one, Tensor)}
    outputs = dict(made.values())

    def private(name: str) -> bool:
        held = [*modules[name].parameters(), *modules[name].buffers()]
        return calls[name] == 1 and all(flow.readers[_storage(tensor)] <= {name} for tensor in held)

    found = [
        (layer, norm)
        for norm, layer in taken.items()
        if {layer, norm}.isdisjoint(keep)
        and private(layer)
        and private(norm)
        and flow.readers[_storage(outputs[layer])] == {norm}
        and _storage(outputs[layer]) not in seen
    ]
    return found, output


def _fold(model: nn.Module, layer_name: str, norm_name: str) -> None:
    layer: Any = model.get_submodule(layer_name)
    norm: Any = model.get_submodule(norm_name)
    wide: list[Any] = [
        None if tensor is None else tensor.detach().double()
        for tensor in (layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    ]
    weight, bias, mean, variance, scale, shift = wide
    scale = torch.ones_like(mean) if scale is None else scale
    shift = torch.zeros_like(mean) if shift is None else shift
    if isinstance(layer, nn.Linear):
        fused = fuse_linear_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    else:
        fused = fuse_conv_bn_weights(
            weight, bias, mean, variance, norm.eps, scale, shift, transpose=isinstance(layer, _TRANSPOSED)
        )
    dtype = layer.weight.dtype
    layer.weight, layer.bias = (nn.Parameter(tensor.to(dtype), layer.weight.requires_grad) for tensor in fused)
    parent, _, child = norm_name.rpartition(".")
    # timm's BatchNorm contains the activation after it: the replacement keeps the children under their names.
    children = OrderedDict(norm.named_children())
    setattr(model.get_submodule(parent), child, nn.Sequential(children) if children else nn.Identity())


def _agrees(folded: nn.Module, example: Any, expected: Any) -> bool:
    try:
        with torch.no_grad():
            output = run(folded, example)
    except Exception:  # a model may access attributes of its BatchNorms that an identity does not have
        return False
    pairs = zip(tree_leaves(output), tree_leaves(expected), strict=False)
    floats = [(a, b) for a, b in pairs if isinstance(b, Tensor) and b.is_floating_point()]
    return all(a.shape == b.shape and float((a.double() - b.double()).norm()) <= _tolerance(b) for a, b in floats)


def _tolerance(tensor: Tensor) -> float:
    # Rounding in some hundred layers gives less than this; a wrong fold gives a relative error of about 1.
    relative = min(1000 * torch.finfo(tensor.dtype).eps, 0.1)
    return relative * (float(tensor.double().norm()) + 1e-3 * math.sqrt(tensor.numel()))


def _is_layer(module: nn.Module) -> bool:
    kind: Any = type(module)
    if kind.forward is nn.Linear.forward:
        return True
    if any(kind.forward is one.forward for one in _TRANSPOSED):
        return bool(module.groups == 1)
    return any(
        kind.forward is one.forward and kind._conv_forward is one._conv_forward  # type: ignore[attr-defined]
        for one in _CONVOLUTIONS
    )


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        known = type(module) in _NORMS or (
            type(module).__name__ == "BatchNormAct2d"
            and [name for name, _ in module.named_children()] == ["drop", "act"]
        )
        return known and module.running_mean is not None and module.running_var is not None
    # FrozenBatchNorm2d of torchvision, transformers and detectron2 is no BatchNorm subclass, but computes the same.
    held = set(module._buffers) == {"weight", "bias", "running_mean", "running_var"} and hasattr(module, "eps")
    return held and type(module).__name__.endswith("FrozenBatchNorm2d")


def _is_plain(module: nn.Module) -> bool:
    return not _has_hooks(module) and not parametrize.is_parametrized(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _rank(module: Any) -> int:
    return 2 if isinstance(module, nn.Linear) else len(module.kernel_size) + 2


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
