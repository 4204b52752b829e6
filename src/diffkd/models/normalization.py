"""Normalisation, image size and classes of a model's published weights, from its library."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffkd.models.extras import require

Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def input_normalization(model: nn.Module, name: str) -> Normalization | None:
    """Return the mean and standard deviation of the images that the published weights of a model expect.

    Args:
        model: what `load_model(name)` built.
        name: its name.

    Returns:
        Mean and standard deviation per channel, for images in [0, 1]; None where nothing is published, or where the
        model's first convolution takes another number of channels.
    """
    source, _, rest = name.partition("/")
    source = "timm" if source.partition(",")[0] == "isa" else source  # a model of timm with sparse attention
    if ".py:" in name:
        return None
    match source:
        case "timm":
            found = _of_timm(model)
        case "torchvision":
            found = _of_torchvision(rest)
        case "hf":
            found = _of_transformers(model, rest)
        case _:
            return None
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if found is None or first not in (None, len(found[0])):
        return None
    return found


def _of_timm(model: nn.Module) -> Normalization | None:
    published = getattr(model, "pretrained_cfg", None)
    if not isinstance(published, dict) or not {"mean", "std"} <= published.keys():
        return None
    return tuple(published["mean"]), tuple(published["std"])


def _of_torchvision(name: str) -> Normalization:
    models = require("torchvision.models", "train", f"model 'torchvision/{name}'")
    builder, _, tag = name.partition(".")
    published = models.get_model_weights(builder)
    transforms = (published[tag] if tag else published.DEFAULT).transforms()
    return tuple(transforms.mean), tuple(transforms.std)


def _of_transformers(model: nn.Module, name: str) -> Normalization | None:
    processing = require("transformers.image_processing_base", "hf", f"model 'hf/{name}'")
    try:
        settings, _ = processing.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return _of_family(name) or _usual_of_transformers(model)
    return _of_settings(settings)


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Of the families whose image processor is another model's, or whose weights serve another model, by type of the
# configuration. RADIO normalises its images itself.
_OF_FAMILIES: Mapping[str, Normalization] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "dinov2": _IMAGENET,
    "dinov2_with_registers": _IMAGENET,
    "dinov3_convnext": _IMAGENET,
    "radio": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "vit_mae": _IMAGENET,
}


def _of_family(name: str) -> Normalization | None:
    transformers = require("transformers", "hf", f"model 'hf/{name}'")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return _OF_FAMILIES.get(config.model_type)


def _of_settings(settings: Mapping[str, Any]) -> Normalization | None:
    if not settings.get("do_normalize", True) or "image_mean" not in settings or "image_std" not in settings:
        return None
    return tuple(settings["image_mean"]), tuple(settings["image_std"])


def _usual_of_transformers(model: nn.Module) -> Normalization | None:
    """Return the default normalisation of the model family's own image processor, None where it borrows another's.

    ResNet, for example, borrows that of ConvNeXt, whose default is not what ResNet's weights were trained with.
    """
    mapping = require("transformers.models.auto.image_processing_auto", "hf", "a model of transformers")
    config = type(config_of(model))
    try:
        found = mapping.IMAGE_PROCESSOR_MAPPING[config]
    except (KeyError, AttributeError, ImportError):
        return None
    kinds = list(found.values()) if isinstance(found, dict) else list(found) if isinstance(found, tuple) else [found]
    family = config.__name__.removesuffix("Config")
    for kind in (kind for kind in kinds if getattr(kind, "__name__", "").startswith(family)):
        mean, std = getattr(kind, "image_mean", None), getattr(kind, "image_std", None)
        if mean is not None and std is not None:
            return tuple(mean), tuple(std)
    return None


def normalization_beside(weights: str | Path) -> Normalization | None:
    """Return the mean and standard deviation in the preprocessor_config.json beside a file of weights, None if none."""
    file = Path(weights).parent / "preprocessor_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return _of_settings(settings) if isinstance(settings, dict) else None
    except (ValueError, TypeError, RecursionError):
        return None


def config_of(model: nn.Module) -> Any:
    """Return the configuration of a model of transformers, also inside of a detector; None for others."""
    for part in (model, getattr(model, "model", None)):
        if part is not None and type(part).__module__.startswith("transformers."):
            return getattr(part, "config", None)
    return None


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classes of a model of transformers, in the order of its scores; () if it has none."""
    names = getattr(config_of(model), "id2label", None)
    if not isinstance(names, dict) or any(str(names[index]) == f"LABEL_{index}" for index in names):
        return ()
    return tuple(str(names[index]) for index in sorted(names))


def own_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the height and width of a library model's input; None if unknown."""
    sizes = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(config_of(model), "image_size", None),
        getattr(model, "image_size", None),
        (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (0, None))[1:],
    )
    for size in sizes:
        if isinstance(size, int) and size > 0:
            return (size, size)
        if isinstance(size, (tuple, list)) and len(size) >= 1 and all(isinstance(side, int) for side in size):
            return (size[0], size[-1])
    return None
