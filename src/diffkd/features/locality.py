"""The right layout among several possible ones, found by a change in one corner of the image; prefix tokens.

Positions of a layer answer most to what changes at their place in the image. Where the shape of an output can be read
in two ways, (N, N, N) as channels first or last, or tokens as several grids, the reading in which the answer lies in
the changed corner is the right one.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.features.calling import with_tensors
from diffkd.features.layout import Layout
from diffkd.files.weights import unwrap

# A reading is taken if the changes look as much like the corner as LEAST, and more than in any other by MARGIN. How
# often it is the right one is counted by benchmarks/layouts.py. Where attention or pooling spreads the changes over the
# whole image, nothing is decided.
LEAST, MARGIN = 0.7, 0.1


def change_corner(example: Any) -> Any:
    """Return a model's input with the upper left quarter of its images, floating-point tensors (..., H, W), changed."""
    return with_tensors(example, _with_corner)


def most_local(layouts: Sequence[Layout], before: Tensor, after: Tensor) -> Layout | None:
    """Return the layout that puts the changes of a layer's output into the corner that was changed.

    Args:
        layouts: the readings that its shape allows.
        before, after: the output for an example, and for what :func:`change_corner` made of it.

    Returns:
        One of the layouts, or None if the changes do not tell.
    """
    if before.shape != after.shape:
        return None
    change = (after.double() - before.double()).abs()
    likeness = torch.stack([_likeness(layout.read(change).mean(dim=(0, 1))) for layout in layouts])
    best, second = likeness.topk(2).values
    return layouts[int(likeness.argmax())] if best > LEAST and best - second > MARGIN else None


def _with_corner(images: Tensor) -> Tensor:
    if images.ndim < 3 or not images.is_floating_point():
        return images
    spread = images.std() if images.numel() > 1 else 0
    return images + (1 + spread) * _corner(images.shape[-2], images.shape[-1]).to(images)


def _likeness(change: Tensor) -> Tensor:
    corner = F.adaptive_avg_pool2d(_corner(64, 64)[None].to(change), (change.shape[0], change.shape[1]))[0]
    return F.cosine_similarity((change - change.mean()).flatten(), (corner - corner.mean()).flatten(), dim=0)


def _corner(height: int, width: int) -> Tensor:
    mask = torch.zeros(height, width)
    mask[: (height + 1) // 2, : (width + 1) // 2] = 1
    return mask


# As timm, torchvision, transformers and the models' own repositories call the parameters.
_TOKENS = re.compile(
    r"((cls|class|dist|distill|distillation|reg|register|storage)_?tokens?|class_embedding)(_?\d+)?", re.ASCII
)


def prefix_tokens(model: nn.Module) -> frozenset[int]:
    """Return the numbers of prefix tokens of which the model speaks.

    Any of its modules may: by an attribute `num_prefix_tokens`, as in timm, or by parameters of its own that are called
    such tokens ("cls_token", "register_tokens"), of which those of one module are added up. Those that differ by a
    number at the end ("cls_token1", "cls_token2") belong to grids of their own.

    Returns:
        The numbers, empty if the model says nothing. Not every layer has these tokens: they may come late or be absent.
    """
    found: set[int] = set()
    for module in unwrap(model).modules():
        told = getattr(module, "num_prefix_tokens", None)
        if isinstance(told, int):
            found.add(told)
            continue
        counts: dict[str, int] = {}
        for name, parameter in module.named_parameters(recurse=False):
            if match := _TOKENS.fullmatch(name):
                counts[match[1]] = parameter.shape[-2] if parameter.ndim > 1 else 1
        if counts:
            found.add(sum(counts.values()))
    return frozenset(found)
