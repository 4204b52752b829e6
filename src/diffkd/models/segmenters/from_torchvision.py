"""Segmenters of torchvision by name."""

import warnings
from typing import Any

from torch import nn

from diffkd.models.extras import fetched, nearest, require
from diffkd.models.from_torchvision import replace_mismatched


def torchvision_segmenter_names() -> list[str]:
    """Return the names of all segmenters of the installed torchvision."""
    models = require("torchvision.models", "segmentation", "listing torchvision segmenters")
    return list(models.list_models(module=models.segmentation))


def build_torchvision_segmenter(
    name: str, num_classes: int, in_channels: int, pretrained: bool, pretrained_backbone: bool, auxiliary: bool
) -> nn.Module:
    """Build a segmenter of torchvision.

    Args:
        name: a builder, with or without the name of its weights ("fcn_resnet50.COCO_WITH_VOC_LABELS_V1").
        num_classes: classes K.
        in_channels: 3, as torchvision builds no other models.
        pretrained: load the named weights, or the default ones. If K differs from theirs, the layers that depend on it
            start from random weights and a warning names them.
        pretrained_backbone: load the backbone's published weights, unless `pretrained` brings them anyway.
        auxiliary: with a second head on an earlier feature.

    Returns:
        The model, in training mode. It returns a mapping with the logits (B, K, H, W) as "out", and those of the
        second head as "aux".

    Raises:
        ModuleNotFoundError: if torchvision is not installed.
        ValueError: if the name or its weights are unknown, `in_channels` is not 3, or there is no second head.
    """
    models = require("torchvision.models", "segmentation", f"model 'torchvision/{name}'")
    builder, _, tag = name.partition(".")
    if builder not in torchvision_segmenter_names():
        raise ValueError(_unknown(models, builder))
    if in_channels != 3:
        raise ValueError(
            f"model 'torchvision/{name}' takes 3 input channels, not {in_channels}: repeat the channels of the images, "
            f"or take smp/DeepLabV3Plus/resnet50, whose first layer adapts"
        )
    published = models.get_model_weights(builder)
    if tag and tag not in published.__members__:
        known = ", ".join(f"'torchvision/{builder}.{member}'" for member in published.__members__)
        raise ValueError(f"model 'torchvision/{name}' has no such pretrained weights; known: {known}")
    # The builders load the backbone's weights unless told not to.
    backbone: dict[str, Any] = {} if pretrained_backbone and not pretrained else {"weights_backbone": None}
    try:
        fresh: nn.Module = models.get_model(builder, num_classes=num_classes, aux_loss=auxiliary, **backbone)
    except NotImplementedError as error:
        raise ValueError(
            f"model 'torchvision/{name}' has no auxiliary head: set auxiliary to False, or take deeplabv3_resnet50"
        ) from error
    if not pretrained:
        return fresh
    weights = published[tag] if tag else published.DEFAULT
    with fetched(f"torchvision/{name}", weights.url):
        model: nn.Module = models.get_model(builder, weights=weights)
    if not auxiliary and hasattr(model, "aux_classifier"):
        setattr(model, "aux_classifier", None)  # noqa: B010, as None is no module to the type checker
    classes = len(weights.meta["categories"])
    if num_classes != classes:
        replaced = replace_mismatched(model, fresh)
        warnings.warn(
            f"model 'torchvision/{name}': {', '.join(replaced)} starts from random weights, since the pretrained one "
            f"has {classes} classes and {num_classes} were asked for",
            stacklevel=4,
        )
    return model


def _unknown(models: Any, builder: str) -> str:
    known = torchvision_segmenter_names()
    if builder in models.list_models(module=models):
        return (
            f"model 'torchvision/{builder}' is a classifier, which gives no class map: give a segmenter, "
            f"torchvision/{known[0]} or smp/DeepLabV3Plus/ENCODER"
        )
    if builder in models.list_models(module=models.detection):
        return (
            f"model 'torchvision/{builder}' is a detector, which gives boxes: give a segmenter, torchvision/{known[0]} "
            "or smp/DeepLabV3Plus/ENCODER, or train it on a detection task"
        )
    return (
        f"model 'torchvision/{builder}' is no segmenter of torchvision; {nearest(builder, known)}. "
        f"It has {', '.join(known)}"
    )
