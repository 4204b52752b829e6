"""Models of timm by name."""

import warnings
from typing import Any

from torch import nn

from diffkd.models.extras import fetched, nearest, require


def timm_names() -> list[str]:
    """Return the names of all architectures of the installed timm, without tags of pretrained weights."""
    return list(require("timm", "train", "listing timm models").list_models())


def build_timm(name: str, num_classes: int | None, in_channels: int | None, pretrained: bool) -> nn.Module:
    """Build a model of timm, which itself adapts the first layer to `in_channels` and replaces the classifier.

    Args:
        name: an architecture, with or without the tag of its weights ("resnet50.a1_in1k"), or a source that timm reads
            itself: "hf-hub:OWNER/NAME" or "local-dir:FOLDER".
        num_classes: length of the output; None for the model's own.
        in_channels: channels of the images; None for the model's own.
        pretrained: load the weights of the tag, or the default ones. If `num_classes` differs from theirs, the new
            classifier starts from random weights and a warning says so.

    Returns:
        The model, in training mode.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        ValueError: if the architecture or the tag is unknown, or it has no pretrained weights.
    """
    timm = require("timm", "train", f"model 'timm/{name}'")
    if ":" not in name:
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            raise ValueError(
                f"model 'timm/{name}' is unknown to timm {timm.__version__}; {nearest(architecture, timm_names())}. "
                "diffkd.models.model_names('timm') lists all."
            )
        weights = timm.list_models(f"{architecture}.*", pretrained=True)
        if (tag and name not in weights) or (pretrained and not weights):
            known = ", ".join(f"'timm/{known}'" for known in weights) or "none: set pretrained to False"
            raise ValueError(f"model 'timm/{name}' has no such pretrained weights; {architecture} has {known}")
    with fetched(f"timm/{name}", _file(timm, name)):
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels)
    published = getattr(model, "pretrained_cfg", None)
    if pretrained and num_classes is not None and isinstance(published, dict):
        classes = published.get("num_classes")
        if classes not in (None, 0, num_classes):
            warnings.warn(
                f"model 'timm/{name}': the classifier {published.get('classifier')} starts from random weights, "
                f"since the pretrained one has {classes} classes and {num_classes} were asked for",
                stacklevel=4,
            )
    return model


def _file(timm: Any, name: str) -> str:
    """Return where the published weights of a model lie."""
    known = timm.models.get_pretrained_cfg(name) if ":" not in name else None
    if known is not None and known.hf_hub_id:
        return f"{known.hf_hub_id} on the Hugging Face Hub (model.safetensors)"
    return str(getattr(known, "url", None) or name)
