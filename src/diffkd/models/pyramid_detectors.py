"""Faster R-CNN, RetinaNet and FCOS of torchvision on any backbone with a feature pyramid."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffkd.models.anchors import Family, build_anchors, fcos_finest
from diffkd.models.backbone_norm import Norm
from diffkd.models.extras import require
from diffkd.models.pyramid import build_pyramid

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
    """Build a detector; the arguments are those of :func:`diffkd.models.load_detector`.

    Faster R-CNN has the levels of strides 4 to 32 and one of 64, RetinaNet and FCOS those of 8 to 32 and of 64 and 128,
    or the nearest that the backbone has. RoIs are read from the level that torchvision's rule for images of 800 pixels
    says, whatever `anchor_scale`: small ones from a fine level.

    Raises:
        ValueError: as :func:`diffkd.models.pyramid.build_pyramid`; also if FCOS cannot have so many channels.
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
        # The radius counts in anchors and is meant in strides: how far positives lie from an object's centre must not
        # shrink with the anchors, or small images would have objects without any.
        stride = pyramid.strides[0]
        radius = 1.5 * stride / fcos_finest(stride, anchor_scale)
        detector = detection.FCOS(
            pyramid.backbone, count, anchor_generator=anchors, center_sampling_radius=radius, **transform
        )
    silence_background(detector)
    return detector


def silence_background(detector: nn.Module) -> None:
    """Let a new RetinaNet or FCOS give label 0 the probability 1e-6 everywhere, in place.

    Their classes are independent, so that a column of logits for label 0, which torchvision keeps though no object has
    it, would otherwise begin as likely as the classes, and could be returned as a detection.
    """
    head = detector.get_submodule("head.classification_head")
    bias = head.get_submodule("cls_logits").get_parameter("bias")
    columns: int = head.num_classes  # type: ignore[assignment]
    with torch.no_grad():
        bias.view(-1, columns)[:, 0] = math.log(1e-6)
