"""Classifiers of torchvision by name."""

import warnings
from typing import Any

from torch import nn

from diffkd.models.extras import fetched, nearest, require

# Built without their auxiliary classifiers, so that they too return one tensor in training mode.
_WITH_AUXILIARY = ("googlenet", "inception_v3")


def torchvision_names() -> list[str]:
    """Return the names of all classifiers of the installed torchvision."""
    models = require("torchvision.models", "train", "listing torchvision models")
    return list(models.list_models(module=models))


def build_torchvision(name: str, num_classes: int | None, in_channels: int | None, pretrained: bool) -> nn.Module:
    """Build a classifier of torchvision.

    Args:
        name: a builder, with or without the name of its weights ("resnet50.IMAGENET1K_V1").
        num_classes: length of the output; None for the model's own.
        in_channels: None or 3, as torchvision builds no other models.
        pretrained: load the named weights, or the default ones. If `num_classes` differs from theirs, the layers that
            depend on it start from random weights and a warning names them.

    Returns:
        The model, in training mode.

    Raises:
        ModuleNotFoundError: if torchvision is not installed.
        ValueError: if the name or its weights are unknown, or `in_channels` is not 3.
    """
    models = require("torchvision.models", "train", f"model 'torchvision/{name}'")
    builder, _, tag = name.partition(".")
    if builder not in torchvision_names():
        raise ValueError(
            f"model 'torchvision/{name}' is no classifier of torchvision; {nearest(builder, torchvision_names())}. "
            "diffkd.models.model_names('torchvision') lists all."
        )
    if in_channels not in (None, 3):
        raise ValueError(
            f"model 'torchvision/{name}' takes 3 input channels, not {in_channels}: repeat the channels of the images, "
            "or take the model from timm, which adapts its first layer"
        )
    published = models.get_model_weights(builder)
    if tag and tag not in published.__members__:
        known = ", ".join(f"'torchvision/{builder}.{member}'" for member in published.__members__)
        raise ValueError(f"model 'torchvision/{name}' has no such pretrained weights; known: {known}")
    options: dict[str, Any] = {"aux_logits": False} if builder in _WITH_AUXILIARY else {}
    fresh_options = {**options, "init_weights": True} if builder in _WITH_AUXILIARY else {}
    if num_classes is not None:
        fresh_options["num_classes"] = num_classes
    if not pretrained:
        fresh: nn.Module = models.get_model(builder, **fresh_options)
        return fresh
    weights = published[tag] if tag else published.DEFAULT
    with fetched(f"torchvision/{name}", weights.url):
        model: nn.Module = models.get_model(builder, weights=weights, **options)
    classes = len(weights.meta["categories"])
    if num_classes not in (None, classes):
        replaced = replace_mismatched(model, models.get_model(builder, **fresh_options))
        warnings.warn(
            f"model 'torchvision/{name}': {', '.join(replaced)} starts from random weights, since the pretrained one "
            f"has {classes} classes and {num_classes} were asked for",
            stacklevel=4,
        )
    return model


def replace_mismatched(model: nn.Module, fresh: nn.Module) -> list[str]:
    """Put those modules of `fresh` into `model` in place whose parameters differ in shape; return their names."""
    replaced = []
    for name, module in fresh.named_modules():
        shapes = [p.shape for p in module.parameters(recurse=False)]
        if shapes != [p.shape for p in model.get_submodule(name).parameters(recurse=False)]:
            replaced.append(name)
    for name in replaced:
        model.set_submodule(name, fresh.get_submodule(name))
    return replaced
