"""Choice between several possible layouts by perturbing one corner of the image; detection of prefix tokens.

Positions of a layer respond most to changes at their place in the image. If a shape allows two layouts, (N, N, N) as
channels first or last, or tokens as several grids, the correct one is that whose response is in the perturbed corner.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.features.forward import with_tensors
from diffkd.features.layout import Layout
from diffkd.files.weights import unwrap

# A layout is chosen if the similarity of the response to the corner is above LEAST, and above that of all others by
# MARGIN. benchmarks/layouts.py counts how often it is correct. If attention or pooling spreads the response over the
# whole image, none is chosen.
LEAST, MARGIN = 0.7, 0.1


def change_corner(example: Any) -> Any:
    """Return a model's input with the upper left quarter of its images, floats (..., H, W), perturbed."""
    return with_tensors(example, _with_corner)


def most_local(layouts: Sequence[Layout], before: Tensor, after: Tensor) -> Layout | None:
    """Return the layout in which a layer's output changed in the perturbed corner.

    Args:
        layouts: the layouts that its shape allows.
        before, after: the output for an example, and for the result of :func:`change_corner`.

    Returns:
        One of the layouts, or None if the changes are not conclusive.
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


# Parameter names in timm, torchvision, transformers and the models' own repositories.
_TOKENS = re.compile(
    r"((cls|class|dist|distill|distillation|reg|register|storage)_?tokens?|class_embedding)(_?\d+)?", re.ASCII
)


def prefix_tokens(model: nn.Module) -> frozenset[int]:
    """Return the numbers of prefix tokens that a model's modules declare.

    A module declares them by an attribute `num_prefix_tokens`, as in timm, or by parameters with such names
    ("cls_token", "register_tokens"), whose tokens are added up per module. Parameters that differ by a final number
    ("cls_token1", "cls_token2") belong to separate grids and count once.

    Returns:
        The numbers, empty if no module declares any. Layers may also have none of these tokens.
    """
    found: set[int] = set()
    for module in unwrap(model).modules():
        of_all = getattr(getattr(module, "config", None), "num_summary_tokens", None)  # RADIO of transformers
        if isinstance(of_all, int):
            return frozenset({of_all})
        declared = getattr(module, "num_prefix_tokens", None)
        if isinstance(declared, int):
            found.add(declared)
            continue
        counts: dict[str, int] = {}
        for name, parameter in module.named_parameters(recurse=False):
            if match := _TOKENS.fullmatch(name):
                counts[match[1]] = parameter.shape[-2] if parameter.ndim > 1 else 1
        if counts:
            found.add(sum(counts.values()))
    return frozenset(found)
