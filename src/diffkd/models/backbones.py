"""Models without a classifier by name: images in, an embedding (B, C) out; vision towers of image-text models."""

import inspect
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffkd.files.fitting import load_weights
from diffkd.models.extras import require
from diffkd.models.from_transformers import read_config, transformers_model, warn_of_random_weights
from diffkd.models.load import build
from diffkd.models.weights import class_entries, fill, library_names, same_draws

_CLASSES = 2  # of the head that is removed
# Entries of an image-text model outside of its vision tower.
_TEXT = ("text_model.", "text_projection", "visual_projection", "logit_scale", "logit_bias")


def load_backbone(
    name: str,
    *,
    in_channels: int | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    weights_key: str | None = None,
) -> nn.Module:
    """Build a model without its classifier, and fill it with weights.

    The layers whose size depends on the number of classes are taken out; timm removes them itself. Weights may be those
    of the whole classifier or of the backbone alone. Of an image-text model of transformers (CLIP, SigLIP) the vision
    tower is taken.

    Args:
        name: as for :func:`~diffkd.models.load_model`.
        in_channels: channels of the images; None for the model's own.
        weights: local file to load strictly, apart from the classifier; None for random or published weights.
        pretrained: load the published weights.
        weights_key: prefix of the weights' names, if the file holds several sets that fit.

    Returns:
        The model, in training mode. Models of transformers return their own object, with `pooler_output` where they
        have one; others the embedding (B, C).

    Raises:
        ValueError: if the name is unknown or that of a model for text, the model cannot be built as asked, or the
            weights do not fit.
        FileNotFoundError: if the file of weights does not exist.

    >>> load_backbone("cifar/resnet8").fc
    Identity()
    """
    if weights is not None and pretrained:
        raise ValueError(
            f"model '{name}' cannot start from both {weights} and the published weights: give weights or pretrained"
        )
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"there is no file {weights} with weights for model '{name}': correct the path")
    if name.startswith("hf/"):
        model = _of_transformers(name.removeprefix("hf/"), in_channels, pretrained)
        if weights is not None:
            load_weights(model, weights, key=weights_key, convert=_vision_names)
        return model
    model = remove_head(_headed(name, in_channels, pretrained), partial(_headed, name, in_channels))
    if weights is not None:
        with same_draws():
            head = _headed(name, in_channels, False).state_dict().keys() - model.state_dict().keys()
        fill(model, weights, key=weights_key, beside=head)
    return model


def remove_head(model: nn.Module, headed: Any) -> nn.Module:
    """Replace the layers of a model that depend on the number of classes by identities, in place.

    Args:
        model: the model, for two classes.
        headed: builds the same for other numbers: `headed(pretrained, num_classes)`.

    Returns:
        The model.
    """
    if type(model).__module__.startswith("timm.") and hasattr(model, "reset_classifier"):
        reset: Any = model.reset_classifier
        reset(0)
        return model
    with same_draws():
        wider = headed(False, _CLASSES + 1)
    for layer in dict.fromkeys(entry.rpartition(".")[0] for entry in class_entries(model, wider)):
        if layer:
            model.set_submodule(layer, nn.Identity())
    return model


def _headed(name: str, in_channels: int | None, pretrained: bool, num_classes: int = _CLASSES) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*starts? from random weights")
        return build(name, num_classes, in_channels, pretrained)


def _of_transformers(name: str, in_channels: int | None, pretrained: bool) -> nn.Module:
    transformers = require("transformers", "hf", f"model 'hf/{name}'")
    config = read_config(name)
    config = getattr(config, "vision_config", None) or config
    if config.model_type == "vit_mae":
        # A masked autoencoder shuffles its patches; the same weights in a ViT keep them in order.
        config = transformers.ViTConfig.from_dict({**config.to_dict(), "model_type": "vit"})
    try:
        kind = transformers.AutoModel._model_mapping[type(config)]
    except KeyError:
        kind = None
    wanted = None if kind is None else getattr(kind, "main_input_name", None)
    arguments = [] if kind is None else list(inspect.signature(kind.forward).parameters)
    if wanted != "pixel_values" or {"spatial_shapes", "input_ids"} & set(arguments):
        takes = "is no model that AutoModel builds" if kind is None else f"is given {', '.join(arguments[1:4])}"
        raise ValueError(
            f"model 'hf/{name}' ({config.model_type}) {takes}, and here only images are: name a vision model, such as "
            "hf/facebook/dinov2-small, or the vision tower of one for images of a fixed size"
        )
    model, report = transformers_model(name, kind, config, in_channels, pretrained, "a vision model")
    missing = {entry for entry in report.get("missing_keys", ()) if entry.startswith("pooler.")}
    if missing and getattr(model, "pooler", None) is not None:
        model.pooler = None  # it would be of random weights, since the checkpoint has none
        report = {**report, "missing_keys": set(report["missing_keys"]) - missing}
    warn_of_random_weights(name, report)
    plain: nn.Module = model
    return plain


def _vision_names(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Convert names as transformers does, and leave out what is not of the vision tower."""
    own = model.state_dict()
    kept = {name: value for name, value in weights.items() if not name.startswith(_TEXT) or name in own}
    converted = library_names(model, kept)
    return kept if converted is None else converted


class AtAnySize(nn.Module):
    """A vision transformer of transformers that resamples its positions to the size of the images.

    Args:
        model: whose forward takes `interpolate_pos_encoding`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """Return the model's output for images (B, C, H, W)."""
        return self.model(images, interpolate_pos_encoding=True)


def with_positions_of(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Return a vision transformer that takes images of another size, its positions resampled.

    Args:
        model: of timm, changed in place, or of transformers; others are returned unchanged.
        size: (H, W) in pixels.

    Raises:
        ValueError: if the patches do not fill the images.
    """
    patch = patch_size(model)
    if patch is not None and (size[0] % patch[0] or size[1] % patch[1]):
        height, width = (-(-side // step) * step for side, step in zip(size, patch, strict=True))
        raise ValueError(
            f"images of {size[0]}x{size[1]} are no whole number of patches of {patch[0]}x{patch[1]}: give {height}x"
            f"{width}, or another multiple"
        )
    resizable: Any = getattr(model, "set_input_size", None)
    if type(model).__module__.startswith("timm.") and callable(resizable):
        resizable(img_size=size)
        return model
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        return AtAnySize(model)
    return model


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Return (height, width) in pixels of the patches of a vision transformer, None for other models."""
    found = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if found is None:
        found = getattr(getattr(model, "config", None), "patch_size", None)
    if isinstance(found, int):
        return (found, found)
    return (int(found[0]), int(found[1])) if isinstance(found, (tuple, list)) and len(found) == 2 else None
