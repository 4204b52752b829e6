"""Segmenters of segmentation-models-pytorch by name."""

from typing import Any

import torch
from torch import nn

from diffkd.models.extras import nearest, require

_TIMM = "tu-"  # smp's own prefix of the encoders that it takes from timm


def build_smp(name: str, num_classes: int, in_channels: int, pretrained_backbone: bool) -> nn.Module:
    """Build a segmenter of segmentation-models-pytorch.

    Args:
        name: "ARCH/ENCODER". ARCH is one of smp's, in upper or lower case ("DeepLabV3Plus", "unet"); ENCODER one of
            smp's ("resnet18", "mit_b0"), or one of timm as "tu-NAME" or "timm/NAME", also as NAME.TAG.
        num_classes: classes K.
        in_channels: channels of the images; smp itself adapts the first layer.
        pretrained_backbone: load the encoder's published weights: "imagenet", else the first that smp lists; of timm
            those of the tag, or the default ones.

    Returns:
        The model, in training mode. It returns the logits (B, K, H, W). Unused parameters, such as those of encoder
        stages that PSPNet does not read, are frozen, since DDP waits for the gradients of all trainable parameters.

    Raises:
        ModuleNotFoundError: if segmentation-models-pytorch is not installed.
        ValueError: if the architecture or the encoder is unknown, has no published weights, or the two do not fit.
    """
    smp = require("segmentation_models_pytorch", "segmentation", f"model 'smp/{name}'")
    architectures = {arch.__name__.lower(): arch.__name__ for arch in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    architecture, _, encoder = name.partition("/")
    if architecture.lower() not in architectures:
        raise ValueError(
            f"model 'smp/{name}' has an unknown architecture '{architecture}'; "
            f"{nearest(architecture.lower(), architectures)}. "
            f"Write smp/ARCH/ENCODER, such as smp/Unet/resnet18, with one of {', '.join(architectures.values())}"
        )
    if not encoder:
        raise ValueError(f"model 'smp/{name}' has no encoder: write smp/{architecture}/resnet18, for instance")
    if encoder.startswith("timm/"):
        encoder = _TIMM + encoder.removeprefix("timm/")
    published = _published_weights(smp, name, encoder)
    if pretrained_backbone and not published:
        raise ValueError(f"model 'smp/{name}': the encoder has no published weights: set pretrained_backbone to False")
    weights = published[0] if pretrained_backbone else None
    options = _transformer_options(encoder) if architecture.lower() == "dpt" else {}
    try:
        model: nn.Module = smp.create_model(architecture, encoder, weights, in_channels, num_classes, **options)
    except OSError:  # of fetching weights
        raise
    except Exception as error:  # the libraries may raise anything for an encoder that does not fit
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"model 'smp/{name}' cannot be built ({type(error).__name__}: {reason}): "
            "take another encoder for this architecture"
        ) from error
    _freeze_what_does_not_run(model, in_channels)
    return model.train()


def _freeze_what_does_not_run(model: nn.Module, in_channels: int) -> None:
    seen: set[nn.Module] = set()

    def note(module: nn.Module, args: Any) -> None:
        seen.add(module)

    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_pre_hook(note) for module in owners]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, in_channels, 128, 128))
    finally:
        for handle in handles:
            handle.remove()
    # Some layers are not called, but their parameters are passed to a function: only whole unused branches are frozen.
    for branch in model.modules():
        inside = [module for module in branch.modules() if module in owners]
        if len(inside) > 1 and not seen.intersection(inside):
            branch.requires_grad_(False)


def _published_weights(smp: Any, name: str, encoder: str) -> list[Any]:
    """List what smp takes as `encoder_weights`, the preferred first; refuse an encoder that does not exist."""
    if encoder.startswith(_TIMM):
        timm = require("timm", "segmentation", f"model 'smp/{name}'")
        architecture, _, tag = encoder.removeprefix(_TIMM).partition(".")
        if not timm.is_model(architecture):
            raise ValueError(
                f"model 'smp/{name}': timm {timm.__version__} has no '{architecture}'; "
                f"{nearest(architecture, timm.list_models())}. diffkd.models.model_names('timm') lists all."
            )
        tags = timm.list_models(f"{architecture}.*", pretrained=True)
        if tag and f"{architecture}.{tag}" not in tags:
            known = ", ".join(f"'{known}'" for known in tags) or "none"
            raise ValueError(f"model 'smp/{name}': timm has no such weights of '{architecture}'; known: {known}")
        return [True] if tags else []
    if encoder not in smp.encoders.encoders:
        known = smp.encoders.get_encoder_names()
        raise ValueError(
            f"model 'smp/{name}' has an unknown encoder '{encoder}'; {nearest(encoder, known)}. "
            f"Take one of smp's ({', '.join(known[:3])}, ...), or write timm/NAME for one of timm"
        )
    return sorted(smp.encoders.encoders[encoder]["pretrained_settings"], key=lambda weights: weights != "imagenet")


def _transformer_options(encoder: str) -> dict[str, Any]:
    """Return what lets DPT take images of any size, and a vision transformer without class token."""
    if not encoder.startswith(_TIMM):
        return {}
    timm = require("timm", "segmentation", f"encoder '{encoder}'")
    with torch.device("meta"):
        probe = timm.create_model(encoder.removeprefix(_TIMM))
    options: dict[str, Any] = {}
    if hasattr(probe, "dynamic_img_size"):
        options["dynamic_img_size"] = True
    if not getattr(probe, "num_prefix_tokens", 0):
        options["decoder_readout"] = "ignore"
    return options
