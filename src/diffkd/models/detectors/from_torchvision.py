"""The detectors that torchvision publishes, with their weights for COCO."""

import warnings
from collections.abc import Sequence

from torch import nn

from diffkd.models.detectors.backbone_norm import Norm, set_norm
from diffkd.models.detectors.pyramid_detectors import FAMILIES, silence_background
from diffkd.models.extras import fetched, nearest, require
from diffkd.models.from_torchvision import torchvision_names


def torchvision_detector_names() -> list[str]:
    """Return the names of torchvision's detectors that need boxes and labels only and take images of any size."""
    models = require("torchvision.models", "train", "listing torchvision detectors")
    return [name for name in models.list_models(module=models.detection) if name.startswith(FAMILIES)]


def build_torchvision_detector(
    name: str,
    num_classes: int,
    *,
    min_size: Sequence[int],
    max_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm: Norm,
    pretrained: bool,
    pretrained_backbone: bool,
) -> nn.Module:
    """Build a detector of torchvision; the arguments are those of :func:`diffkd.models.detectors.load`.

    Args:
        name: a builder, with or without the name of its weights ("fcos_resnet50_fpn.COCO_V1").

    Raises:
        ValueError: if the name or its weights are unknown, or `norm` would discard weights.
    """
    models = require("torchvision.models", "train", f"detector 'torchvision/{name}'")
    builder, _, tag = name.partition(".")
    if builder not in torchvision_detector_names():
        raise ValueError(f"detector 'torchvision/{name}' {_why_not(builder)}")
    published = models.get_model_weights(builder)
    if tag and tag not in published.__members__:
        known = ", ".join(f"'torchvision/{builder}.{member}'" for member in published.__members__)
        raise ValueError(f"detector 'torchvision/{name}' has no such pretrained weights; known: {known}")
    if norm == "group" and (pretrained or pretrained_backbone):
        raise ValueError(
            f"norm 'group' would discard the statistics that the pretrained weights of 'torchvision/{name}' rely on: "
            "choose 'frozen' or 'batch', or leave the pretrained weights out"
        )
    options = {"min_size": tuple(min_size), "max_size": max_size, "image_mean": list(mean), "image_std": list(std)}
    backbone = "DEFAULT" if pretrained_backbone and not pretrained else None
    count = num_classes + 1  # torchvision counts the background, label 0
    if not pretrained:
        with fetched(f"torchvision/{name}", "download.pytorch.org (its backbone)"):
            model: nn.Module = models.get_model(builder, weights_backbone=backbone, num_classes=count, **options)
        if not builder.startswith("fasterrcnn"):
            silence_background(model)
    else:
        weights = published[tag] if tag else published.DEFAULT
        with fetched(f"torchvision/{name}", weights.url):
            model = models.get_model(builder, weights=weights, **options)
        classes = len(weights.meta["categories"])
        if classes != count:
            fresh = models.get_model(builder, weights_backbone=None, num_classes=count, **options)
            if not builder.startswith("fasterrcnn"):
                silence_background(fresh)
            replaced = _replace_class_layers(model, fresh)
            warnings.warn(
                f"detector 'torchvision/{name}': {', '.join(replaced)} starts from random weights, since the "
                f"pretrained one has {classes - 1} classes and {num_classes} were asked for",
                stacklevel=4,
            )
    set_norm(model.get_submodule("backbone.body"), norm)
    return model


def _replace_class_layers(model: nn.Module, fresh: nn.Module) -> list[str]:
    replaced = []
    for name, module in fresh.named_modules():
        # The backbone has no classes, and its normalisation may be frozen in one and not in the other.
        if name.startswith("backbone"):
            continue
        shapes = [p.shape for p in module.parameters(recurse=False)]
        if shapes != [p.shape for p in model.get_submodule(name).parameters(recurse=False)]:
            replaced.append(name)
        if isinstance(getattr(module, "num_classes", None), int):
            model.get_submodule(name).num_classes = module.num_classes
    for name in replaced:
        model.set_submodule(name, fresh.get_submodule(name))
    return replaced


def _why_not(builder: str) -> str:
    if builder.startswith("ssd"):
        return f"resizes images to one fixed size of its own; {_instead()}"
    if builder.startswith(("maskrcnn", "keypointrcnn")):
        return f"learns from masks or keypoints besides boxes; {_instead()}"
    if builder in torchvision_names():
        return f"is a classifier: give 'fasterrcnn/{builder}', 'retinanet/{builder}' or 'fcos/{builder}'"
    return f"is unknown; {nearest(builder, torchvision_detector_names())}. {_instead()}"


def _instead() -> str:
    return "known: " + ", ".join(f"'torchvision/{known}'" for known in torchvision_detector_names())
