"""Any segmenter by name: segmentation-models-pytorch, torchvision, transformers, or a function of the user's own."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from diffkd.models.extras import nearest
from diffkd.models.from_function import build_from_function
from diffkd.models.from_transformers import build_transformers
from diffkd.models.segmenters.from_smp import build_smp
from diffkd.models.segmenters.from_torchvision import build_torchvision_segmenter, torchvision_segmenter_names
from diffkd.models.weights import fill

_FORMS = (
    "smp/ARCH/ENCODER (smp/DeepLabV3Plus/resnet18), torchvision/NAME (torchvision/deeplabv3_resnet50), "
    "hf/NAME_OR_FOLDER, package.module:function or path/to/file.py:function"
)


def load_segmenter(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    weights: str | Path | None = None,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    auxiliary: bool = False,
    weights_key: str | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Build a model for semantic segmentation by name and fill it with weights.

    Args:
        name: "smp/ARCH/ENCODER" (ENCODER one of smp's, or "tu-NAME" or "timm/NAME" for one of timm),
            "torchvision/NAME", "hf/NAME_OR_FOLDER", "package.module:function" or "path/to/file.py:function". The last
            two run the user's own code.
        num_classes: classes K. Functions get it if they take it.
        in_channels: channels of the images. Functions get it if they take it.
        weights: local file to load strictly; None for random or published weights.
        pretrained: load the published weights of the whole model, which may be fetched from the network.
        pretrained_backbone: load the published weights of the encoder alone, likewise; nothing is fetched if `weights`
            or `pretrained` fill the encoder anyway.
        auxiliary: with an auxiliary head, a second class map from an earlier layer; torchvision's and functions only.
        weights_key: prefix of the weights' names, if the file holds several sets that fit.
        new_head: initialise layers that depend on `num_classes` randomly if the file has none or others.

    Returns:
        The model, in training mode unless the user's own code chose otherwise. For images (B, in_channels, H, W), smp's
        return the logits (B, K, H, W), torchvision's a mapping with them as "out" (and "aux"), transformers' an object
        with `logits` of a lower resolution.

    Raises:
        ValueError: if the name is unknown or that of another kind of model, the model cannot be built as asked, or the
            weights do not fit.
        FileNotFoundError: if the file of weights or code does not exist.
        ModuleNotFoundError: if an extra of this package must be installed first.
        TypeError: if the user's function returns no model.

    Warns:
        UserWarning: if a layer of a pretrained model starts from random weights, since its number of classes differs.

    >>> load_segmenter("torchvision/lraspp_mobilenet_v3_large", num_classes=5).classifier.low_classifier.out_channels
    5
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument} {value} leaves model '{name}' nothing to work on: it must be at least 1")
    if weights is not None and pretrained:
        raise ValueError(
            f"model '{name}' cannot start from both {weights} and the published weights: give weights or pretrained"
        )
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"there is no file {weights} with weights for model '{name}': correct the path")
    model = _build(name, num_classes, in_channels, pretrained, pretrained_backbone and weights is None, auxiliary)
    if weights is not None:
        wider = partial(_build, name, num_classes + 1, in_channels, False, False, auxiliary) if new_head else None
        fill(model, weights, key=weights_key, wider=wider)
    return model


def _build(
    name: str, num_classes: int, in_channels: int, pretrained: bool, pretrained_backbone: bool, auxiliary: bool
) -> nn.Module:
    source, _, rest = name.partition("/")
    # A path may begin with a folder named like a source.
    if ".py:" in name or (":" in name and source not in ("smp", "timm", "hf")):
        return build_from_function(
            name, num_classes, in_channels, pretrained, pretrained_backbone=pretrained_backbone, auxiliary=auxiliary
        )
    if auxiliary and source in ("smp", "hf"):
        raise ValueError(
            f"model '{name}' gives no second class map: set auxiliary to False, or take one of torchvision, such as "
            "torchvision/deeplabv3_resnet50"
        )
    match source:
        case "smp":
            if pretrained:
                raise ValueError(
                    f"model '{name}' is published without weights of the whole: set pretrained_backbone for those of "
                    "its encoder, or give a file of weights"
                )
            return build_smp(rest, num_classes, in_channels, pretrained_backbone)
        case "torchvision":
            return build_torchvision_segmenter(
                rest, num_classes, in_channels, pretrained, pretrained_backbone, auxiliary
            )
        case "hf":
            if pretrained_backbone and not pretrained:
                raise ValueError(
                    f"model '{name}' is published as a whole: set pretrained, and for the weights of the encoder alone "
                    "name the model that holds only these, such as hf/nvidia/mit-b0"
                )
            return build_transformers(
                rest, num_classes, in_channels, pretrained, "AutoModelForSemanticSegmentation", "a semantic segmenter"
            )
        case "timm":
            raise ValueError(
                f"model '{name}' is a classifier, which gives no class map: make it the encoder of one, "
                f"smp/DeepLabV3Plus/{name}"
            )
        case "cifar":
            raise ValueError(
                f"model '{name}' is a classifier of small images, which gives no class map: "
                "give a segmenter, such as smp/DeepLabV3Plus/resnet18"
            )
    if find_spec("torchvision") and name.lower() in torchvision_segmenter_names():
        raise ValueError(f"segmenter '{name}' has no known source; write torchvision/{name.lower()}")
    known = [f"{prefix}/{rest}" for prefix in ("smp", "torchvision", "hf")]
    raise ValueError(f"segmenter '{name}' has no known source; {nearest(name, known)}. Write {_FORMS}.")
