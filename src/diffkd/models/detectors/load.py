"""Any detector by name: on a backbone with a feature pyramid, torchvision's, transformers', or the user's own."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from diffkd.models.detectors.backbone_norm import Norm, norm_of_weights
from diffkd.models.detectors.from_torchvision import build_torchvision_detector, torchvision_detector_names
from diffkd.models.detectors.from_transformers import build_transformers_detector
from diffkd.models.detectors.pyramid import backbone_names
from diffkd.models.detectors.pyramid_detectors import FAMILIES, REFERENCE, Family, build_pyramid_detector
from diffkd.models.extras import nearest
from diffkd.models.from_function import build_from_function
from diffkd.models.weights import fill

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_FORMS = (
    "fasterrcnn/BACKBONE, retinanet/BACKBONE, fcos/BACKBONE (each also with timm/NAME as backbone), torchvision/NAME, "
    "hf/NAME_OR_FOLDER, package.module:function or path/to/file.py:function"
)


def load_detector(
    name: str,
    *,
    num_classes: int,
    min_size: Sequence[int] = (REFERENCE,),
    max_size: int = 1333,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    weights: str | Path | None = None,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    anchor_scale: float | None = None,
    fpn_channels: int = 256,
    norm: Norm = "auto",
    weights_key: str | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Build a detector by name and fill it with weights.

    All follow torchvision's interface: in training `model(images, targets)` returns a mapping of losses, in evaluation
    `model(images)` a list of mappings of boxes, labels and scores. Labels are 1..num_classes.

    Args:
        name: "fasterrcnn/BACKBONE", "retinanet/BACKBONE" or "fcos/BACKBONE", where the backbone is torchvision's
            ("resnet18", "mobilenet_v3_large", ...) or "timm/NAME"; "torchvision/NAME", one of its published detectors;
            "hf/NAME_OR_FOLDER", an object detector of transformers; "package.module:function" or
            "path/to/file.py:function", which run the user's own code and get those of the arguments from `num_classes`
            to `std`, `anchor_scale`, `fpn_channels`, `norm`, `pretrained` and `pretrained_backbone` that they name.
        num_classes: number of classes without background.
        min_size: shorter side that images are resized to, in pixels; of several one is drawn per image in training, and
            the last is used in evaluation. Transformers without a padding mask make squares of the last.
        max_size: upper limit of the longer side, in pixels.
        mean, std: of the images in [0, 1], per channel, as the weights expect; part of the detector's `transform`.
        weights: local file to load strictly; None for random or pretrained weights.
        pretrained: load the published weights of torchvision's or transformers' detector, which may be fetched from the
            network. Layers that depend on another number of classes start from random weights and a warning names them.
        pretrained_backbone: load the published ImageNet weights of the backbone. Not fetched where `weights` are given.
        anchor_scale: size of anchors against torchvision's, which are for images of 800 pixels; None for the last
            `min_size` / 800. For pyramids on a backbone; at 1 the anchors are torchvision's.
        fpn_channels: channels of the feature pyramid. For pyramids on a backbone.
        norm: replacement of the backbone's batch normalisations: "batch", "frozen" (constants; for pretrained weights,
            as batches of detection are small) or "group" (GroupNorm; for tiny batches from scratch). "auto": that of
            the file of `weights`; else "frozen" for pretrained backbones and "batch" for others; torchvision's own
            choice for its detectors. Not for transformers.
        weights_key: prefix of the weights' names, if the file holds several sets that fit.
        new_head: initialise layers that depend on `num_classes` randomly if the file has none or others.

    Returns:
        The detector, in training mode unless the user's own code chose otherwise.

    Raises:
        ValueError: if the name is unknown, the detector cannot be built as asked, or the weights do not fit.
        FileNotFoundError: if the file of weights or code does not exist.
        ModuleNotFoundError: if an extra of this package must be installed first.
        TypeError: if the user's function returns no model.

    Warns:
        UserWarning: if layers of a pretrained detector start from random weights.

    >>> detector = load_detector("retinanet/resnet18", num_classes=3, min_size=(160,), max_size=200)
    >>> detector.anchor_generator.sizes[0]
    (6.4, 8.0, 10.0)
    """
    if num_classes < 1:
        raise ValueError(f"num_classes {num_classes} leaves detector '{name}' nothing to find: it must be at least 1")
    sizes = _checked_sizes(min_size, max_size)
    _check_numbers(mean, std, anchor_scale, fpn_channels)
    if weights is not None and pretrained:
        raise ValueError(
            f"detector '{name}' cannot start from both {weights} and the published weights: give weights or pretrained"
        )
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"there is no file {weights} with weights for detector '{name}': correct the path")
        pretrained_backbone = False
        family = name.partition("/")[0]
        if norm == "auto" and family in (*FAMILIES, "torchvision"):
            norm = norm_of_weights(weights, weights_key)
    rest = (sizes, max_size, mean, std, pretrained, pretrained_backbone, anchor_scale, fpn_channels, norm)
    detector = _build(name, num_classes, *rest)
    if weights is not None:
        wider = partial(_build, name, num_classes + 1, *rest) if new_head else None
        fill(detector, weights, key=weights_key, wider=wider)
    return detector


def _build(
    name: str,
    num_classes: int,
    min_size: tuple[int, ...],
    max_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    pretrained: bool,
    pretrained_backbone: bool,
    anchor_scale: float | None,
    fpn_channels: int,
    norm: Norm,
) -> nn.Module:
    source, _, rest = name.partition("/")
    # A path may begin with a folder called like a source, and timm's own sources have a colon.
    if ".py:" in name or (":" in name and source not in (*FAMILIES, "hf")):
        return build_from_function(
            name,
            num_classes,
            None,
            pretrained,
            min_size=min_size,
            max_size=max_size,
            mean=mean,
            std=std,
            pretrained_backbone=pretrained_backbone,
            anchor_scale=anchor_scale,
            fpn_channels=fpn_channels,
            norm=norm,
        )
    family: Family | None = next((known for known in FAMILIES if known == source), None)
    if family is not None:
        if pretrained:
            raise ValueError(
                f"detector '{name}' has no published weights: set pretrained to False and pretrained_backbone to True, "
                f"or take one of {', '.join(f'torchvision/{one}' for one in torchvision_detector_names())}"
            )
        return build_pyramid_detector(
            family,
            rest,
            num_classes,
            min_size=min_size,
            max_size=max_size,
            mean=mean,
            std=std,
            anchor_scale=min_size[-1] / REFERENCE if anchor_scale is None else anchor_scale,
            fpn_channels=fpn_channels,
            norm=norm,
            pretrained_backbone=pretrained_backbone,
        )
    if source in ("torchvision", "hf") and (anchor_scale is not None or fpn_channels != 256):
        raise ValueError(
            f"detector '{name}' is built as published: leave anchor_scale and fpn_channels out, or take one of "
            f"{', '.join(f'{family}/BACKBONE' for family in FAMILIES)}"
        )
    if source == "torchvision":
        return build_torchvision_detector(
            rest,
            num_classes,
            min_size=min_size,
            max_size=max_size,
            mean=mean,
            std=std,
            norm=norm,
            pretrained=pretrained,
            pretrained_backbone=pretrained_backbone,
        )
    if source == "hf":
        if pretrained_backbone or norm != "auto":
            raise ValueError(
                f"detector '{name}' takes neither pretrained_backbone nor norm, which its configuration decides: leave "
                "them out, and give pretrained for the published weights of the whole"
            )
        return build_transformers_detector(
            rest, num_classes, min_size=min_size, max_size=max_size, mean=mean, std=std, pretrained=pretrained
        )
    raise ValueError(f"detector '{name}' {_why_not(name, source, rest)}. Write {_FORMS}.")


def _why_not(name: str, source: str, rest: str) -> str:
    if (source == "timm" and rest) or name in backbone_names():
        return f"is a classifier: as a backbone it is {_listed_with(name)}"
    if source in ("cifar", "smp"):
        return f"is no detector: take {_listed_with('resnet18')}"
    sources = [*FAMILIES, "torchvision", "hf"]
    known = [f"{source}/{rest}" for source in sources] + [f"torchvision/{one}" for one in torchvision_detector_names()]
    return f"has no known source; {nearest(name, known)}"


def _listed_with(backbone: str) -> str:
    return ", ".join(f"'{family}/{backbone}'" for family in FAMILIES)


def _checked_sizes(min_size: Sequence[int], max_size: int) -> tuple[int, ...]:
    sizes = tuple(min_size)
    if not sizes or min(sizes) < 1 or max(sizes) > max_size:
        raise ValueError(
            f"min_size {sizes} and max_size {max_size} say no size of images: give one or more numbers of pixels, none "
            "above max_size"
        )
    return sizes


def _check_numbers(mean: Sequence[float], std: Sequence[float], anchor_scale: float | None, fpn_channels: int) -> None:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} must be 3 numbers each, those of std above 0")
    if anchor_scale is not None and not 0 < anchor_scale < float("inf"):
        raise ValueError(f"anchor_scale {anchor_scale} must be above 0 and finite")
    if fpn_channels < 1:
        raise ValueError(f"fpn_channels {fpn_channels} must be at least 1")
