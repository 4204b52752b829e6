"""Faster R-CNN, RetinaNet and FCOS of torchvision on any backbone with a feature pyramid; their anchors."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from diffkd.models.detectors.backbone_norm import Norm
from diffkd.models.detectors.pyramid import build_pyramid
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


FAMILIES: tuple[Family, ...] = ("fasterrcnn", "retinanet", "fcos")


def build_pyramid_detector(
    family: Family,
    backbone: str,
    num_classes: int,
    *,
    min_size: Sequence[int],
    max_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    anchor_scale: float,
    fpn_channels: int,
    norm: Norm,
    pretrained_backbone: bool,
) -> nn.Module:
    """Build a detector; the arguments are those of :func:`diffkd.models.detectors.load`.

    Faster R-CNN has the levels of strides 4 to 32 and one of 64, RetinaNet and FCOS those of 8 to 32 and of 64 and 128,
    or the nearest that the backbone has. RoIs are read from the level that torchvision's rule for images of 800 pixels
    says, whatever `anchor_scale`: small ones from a fine level.

    Raises:
        ValueError: as :func:`diffkd.models.detectors.pyramid.build_pyramid`; also if FCOS cannot have so many channels.
    """
    detection = require("torchvision.models.detection", "train", f"a {family} detector")
    # A group of one channel would have no spread at the one position of the coarsest level of a small image.
    if family == "fcos" and (fpn_channels % 32 or fpn_channels < 64):
        raise ValueError(
            f"fpn_channels {fpn_channels} do not suit fcos, whose head normalises 32 groups of at least 2 channels: "
            f"take a multiple of 32, such as {max(64, 32 * round(fpn_channels / 32))}"
        )
    pyramid = build_pyramid(
        backbone,
        finest=4 if family == "fasterrcnn" else 8,
        pooled=family == "fasterrcnn",
        channels=fpn_channels,
        norm=norm,
        pretrained=pretrained_backbone,
    )
    anchors = build_anchors(family, pyramid.strides, anchor_scale)
    transform: dict[str, Any] = {
        "min_size": tuple(min_size),
        "max_size": max_size,
        "image_mean": list(mean),
        "image_std": list(std),
        "size_divisible": pyramid.divisor,
    }
    count = num_classes + 1  # torchvision counts the background, label 0
    if family == "fasterrcnn":
        pool = require("torchvision.ops", "train", "a detector").MultiScaleRoIAlign(
            featmap_names=list(pyramid.names), output_size=7, sampling_ratio=2
        )
        detector: nn.Module = detection.FasterRCNN(
            pyramid.backbone, count, rpn_anchor_generator=anchors, box_roi_pool=pool, **transform
        )
        return detector
    if family == "retinanet":
        detector = detection.RetinaNet(pyramid.backbone, count, anchor_generator=anchors, **transform)
    else:
        # The radius is in units of anchors, but must stay constant in strides: if it shrank with the anchors, objects
        # in small images could have no positive positions.
        stride = pyramid.strides[0]
        radius = 1.5 * stride / fcos_finest(stride, anchor_scale)
        detector = detection.FCOS(
            pyramid.backbone, count, anchor_generator=anchors, center_sampling_radius=radius, **transform
        )
    silence_background(detector)
    return detector


def silence_background(detector: nn.Module) -> None:
    """Initialise label 0 of a new RetinaNet or FCOS to the probability 1e-6 everywhere, in place.

    Their classes are independent, and torchvision keeps logits for label 0, although no object has it. They would
    otherwise start as likely as the classes, and could be returned as detections.
    """
    head = detector.get_submodule("head.classification_head")
    bias = head.get_submodule("cls_logits").get_parameter("bias")
    columns: int = head.num_classes  # type: ignore[assignment]
    with torch.no_grad():
        bias.view(-1, columns)[:, 0] = math.log(1e-6)
