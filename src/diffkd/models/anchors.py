"""Anchors of detectors that fit the strides of their feature maps and the size of their images."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from diffkd.models.extras import require

Family = Literal["fasterrcnn", "retinanet", "fcos"]

# The size of image, along its shorter side, that torchvision's anchors are made for.
REFERENCE = 800


def build_anchors(family: Family, strides: Sequence[int], scale: float) -> Any:
    """Return torchvision's AnchorGenerator for a pyramid.

    At scale 1 and the usual strides the anchors are torchvision's own. Since the generator rounds corners to whole
    pixels, a scale that would leave the finest level with anchors of under 4 pixels (FCOS: 2) is raised to that.

    Args:
        family: "fasterrcnn": one size of 8 strides per level; "retinanet": three sizes, 2^(1/3) apart, from 4 strides
            on; both at the ratios 1/2, 1 and 2. "fcos": one square of one stride, which says how large the objects
            of a level are.
        strides: pixels per position, of each level from the finest on.
        scale: by how much all anchors are smaller or larger, usually the shorter side of images over 800.
    """
    generator = require("torchvision.models.detection.anchor_utils", "train", "a detector").AnchorGenerator
    if family == "fcos":
        finest = fcos_finest(strides[0], scale)
        return generator(tuple((finest * stride // strides[0],) for stride in strides), ((1.0,),) * len(strides))
    first = (8 if family == "fasterrcnn" else 4) * strides[0]
    scale = max(scale, 4 / first)
    sizes: tuple[tuple[float, ...], ...]
    if family == "fasterrcnn":
        sizes = tuple((8 * stride * scale,) for stride in strides)
    else:
        octaves = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
        sizes = tuple(tuple(int(4 * stride * octave) * scale for octave in octaves) for stride in strides)
    return generator(sizes, ((0.5, 1.0, 2.0),) * len(strides))


def fcos_finest(stride: int, scale: float) -> int:
    """Return the side of FCOS's anchors at its finest level: even, so that rounding leaves it as it is, and above 0."""
    return max(2, 2 * math.floor(stride * scale / 2 + 0.5))
