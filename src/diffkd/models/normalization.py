"""The normalisation of images that a model's published weights were trained with."""

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
    if ".py:" in name:
        return None
    match source:
        case "timm":
            found = _of_timm(model)
        case "torchvision":
            found = _of_torchvision(rest)
        case "hf":
            found = _of_transformers(rest)
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


def _of_transformers(name: str) -> Normalization | None:
    processing = require("transformers.image_processing_base", "hf", f"model 'hf/{name}'")
    try:
        settings, _ = processing.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return None
    if not settings.get("do_normalize", True) or "image_mean" not in settings or "image_std" not in settings:
        return None
    return tuple(settings["image_mean"]), tuple(settings["image_std"])
