"""Models of Hugging Face transformers, from a local folder or from the Hub."""

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from diffkd.models.extras import require


def build_transformers(
    name: str,
    num_classes: int | None,
    in_channels: int | None,
    pretrained: bool,
    auto_class: str = "AutoModelForImageClassification",
    kind: str = "an image classifier",
) -> nn.Module:
    """Build a model of transformers; code that comes with a model is never run.

    Args:
        name: a folder with config.json (and model.safetensors for its weights), or a name on the Hub.
        num_classes: length of the logits; None for the model's own.
        in_channels: channels of the images; None for the model's own.
        pretrained: load the weights, from safetensors only; else only the configuration is read and the weights are
            random. A layer that the weights do not fill starts from random weights and a warning names it.
        auto_class: the class of transformers that knows the models of the wanted kind.
        kind: what that kind is called in an error.

    Returns:
        The model, in training mode and float32. Its output is transformers' own object; the scores are its `logits`.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        ValueError: if there is no such model, it is of another kind, it has no safetensors, or it cannot take
            `in_channels`.
    """
    transformers = require("transformers", "hf", f"model 'hf/{name}'")
    config = read_config(name, {} if num_classes is None else {"num_labels": num_classes})
    factory = getattr(transformers, auto_class)
    new_head = num_classes is not None
    model, report = transformers_model(name, factory, config, in_channels, pretrained, kind, new_head=new_head)
    warn_of_random_weights(name, report)
    if pretrained:
        keep_constants(model, factory)
    plain: nn.Module = model
    return plain


def read_config(name: str, options: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Read the configuration of a model, with some values changed.

    Raises:
        ValueError: if there is none.
    """
    transformers = require("transformers", "hf", f"model 'hf/{name}'")
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model 'hf/{name}' has no readable configuration ({_first_line(error)}): give a folder with config.json, "
            "or the name of a model on the Hub"
        ) from error


def transformers_model(
    name: str,
    factory: Any,
    config: Any,
    in_channels: int | None,
    pretrained: bool,
    kind: str,
    *,
    new_head: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Build a model from its configuration, and load its weights.

    Args:
        name: folder or name on the Hub, of the weights.
        factory: its class, or an auto class of transformers.
        config: its configuration, which is changed.
        in_channels: as for :func:`build_transformers`.
        pretrained: likewise.
        kind: likewise.
        new_head: let layers of another shape start from random weights.

    Returns:
        The model, in training mode and float32, and transformers' report of the loading.

    Raises:
        ValueError: as :func:`build_transformers`.
    """
    if in_channels is not None:
        _set_channels(name, config, in_channels, pretrained)
    if getattr(config, "use_auxiliary_head", False):
        # It serves only the loss that the model computes itself, so here its parameters would never get a gradient.
        config.use_auxiliary_head = False
    try:
        if not pretrained:
            if hasattr(factory, "from_config"):
                fresh = factory.from_config(config, trust_remote_code=False, dtype=torch.float32)
            else:
                fresh = factory(config)
            return fresh.train(), {}
        model, report = factory.from_pretrained(
            name,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=new_head,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model 'hf/{name}' cannot be built ({_first_line(error)}): it must be {kind} whose weights, "
            "if asked for, are safetensors"
        ) from error
    return model.train(), report


def keep_constants(model: Any, factory: Any) -> None:
    """Freeze what is constant in a model of that configuration, and which loading its weights has made trainable."""
    with torch.device("meta"):
        fresh = factory.from_config(model.config, trust_remote_code=False)
    constant = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name in constant:
            parameter.requires_grad_(False)


def _set_channels(name: str, config: Any, in_channels: int, pretrained: bool) -> None:
    # A segmenter around another model keeps the channels in the configuration of that.
    parts = (config, getattr(config, "backbone_config", None))
    holder = next((part for part in parts if getattr(part, "num_channels", None) is not None), None)
    own = 3 if holder is None else holder.num_channels
    if own == in_channels:
        return
    if holder is None or pretrained:
        reason = "its weights are for" if pretrained else "its configuration has no num_channels to change from"
        raise ValueError(
            f"model 'hf/{name}' cannot take {in_channels} input channels, {reason} {own}: repeat the channels of "
            "the images, or take a model from timm, which adapts its first layer"
        )
    holder.num_channels = in_channels


def warn_of_random_weights(name: str, report: dict[str, Any]) -> None:
    """Warn of the layers that transformers' report names as not loaded, if there are any."""
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in report.get("mismatched_keys", ())]
    random = sorted({*mismatched, *report.get("missing_keys", ())})
    if random:
        warnings.warn(
            f"model 'hf/{name}': {', '.join(random)} start from random weights, since the pretrained ones are missing "
            "or of another shape",
            stacklevel=5,
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
