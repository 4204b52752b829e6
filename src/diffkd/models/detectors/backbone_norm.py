"""The normalisation of a detector's backbone: batches of detection are often too small for batch statistics."""

import math
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from diffkd.files.weights import read_contents
from diffkd.models.extras import require

Norm = Literal["auto", "batch", "frozen", "group"]


def norm_of_weights(path: str | Path, key: str | None = None) -> Norm:
    """Detect the normalisation of a detector's backbone from a file of its weights.

    Args:
        path: as for `read_weights`.
        key: prefix of the weights' names, if the file holds several sets.

    Returns:
        "frozen" if there are running statistics but no num_batches_tracked, "batch" with both, "group" with neither,
        which is also valid for a backbone without batch normalisation.
    """
    # With any prefix that trainers and wrappers have added.
    names = {
        name.rpartition(".")[2]
        for name in read_contents(path).tensors
        if "backbone.body." in name and (key is None or key in name)
    }
    if "running_mean" not in names:
        return "group"
    return "batch" if "num_batches_tracked" in names else "frozen"


def set_norm(module: nn.Module, norm: Norm) -> None:
    """Replace every batch normalisation in `module` by another kind, in place.

    Args:
        module: of torchvision or timm.
        norm: "frozen": current statistics, scale and shift as constants; "batch": the same values, but trained and
            updated; "group": GroupNorm of at most 32 groups, scale 1 and shift 0; "auto": no change.
    """
    if norm == "auto":
        return
    for name, child in module.named_children():
        replaced = _replacement(child, norm)
        if replaced is child:
            set_norm(child, norm)
        else:
            module.add_module(name, replaced)


def _replacement(module: nn.Module, norm: Norm) -> nn.Module:
    kind = type(module).__name__
    if not (isinstance(module, nn.BatchNorm2d) or kind.startswith("FrozenBatchNorm")):
        return module
    if isinstance(getattr(module, "act", None), nn.Module):  # timm's layers, which hold the activation too
        return _with_activation(module, norm)
    channels = _channels(module)
    if norm == "group":
        return nn.GroupNorm(_groups(channels), channels)
    if isinstance(module, nn.BatchNorm2d) == (norm == "batch"):
        return module
    frozen = require("torchvision.ops", "train", "a frozen normalisation").FrozenBatchNorm2d
    eps: float = module.eps  # type: ignore[assignment]
    new: nn.Module = nn.BatchNorm2d(channels, eps=eps) if norm == "batch" else frozen(channels, eps=eps)
    own = new.state_dict()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name in own:
                own[name].copy_(value)
    return new


def _with_activation(module: nn.Module, norm: Norm) -> nn.Module:
    layers = require("timm.layers", "train", "a backbone of timm")
    if norm == "frozen":
        frozen: nn.Module = layers.freeze_batch_norm_2d(module)
        return frozen
    if norm == "batch":
        return module
    channels = _channels(module)
    group: nn.Module = layers.GroupNormAct(channels, _groups(channels), apply_act=False)
    group.drop, group.act = module.drop, module.act
    return group


def _channels(module: nn.Module) -> int:
    return module.get_buffer("running_mean").shape[0]


def _groups(channels: int) -> int:
    # At least two channels per group: one channel with a single position (small images) has no variance.
    return max(1, math.gcd(64, channels) // 2)
