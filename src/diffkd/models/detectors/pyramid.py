"""Backbones of torchvision and timm with a feature pyramid (Lin et al. 2017), as torchvision's detectors take them."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffkd.models.detectors.backbone_norm import Norm, set_norm
from diffkd.models.extras import nearest, require
from diffkd.models.from_timm import timm_names
from diffkd.models.from_torchvision import build_torchvision, torchvision_names

# Families whose stages are layer1 to layer4, or a sequence called features with maps (B, C, H, W) in between.
_RESNETS = ("resnet", "resnext", "wide_resnet")
_SEQUENCES = ("mobilenet", "efficientnet", "convnext")
_COARSEST = 32


@dataclass(frozen=True)
class Pyramid:
    """A backbone with its feature pyramid.

    Attributes:
        backbone: (B, 3, H, W) to an ordered mapping of maps (B, C, h, w); its `out_channels` is C.
        names: of the levels that come from the backbone, from the finest on: "0", "1", ...
        strides: pixels per position of all levels, those after the backbone's included.
    """

    backbone: nn.Module
    names: tuple[str, ...]
    strides: tuple[int, ...]

    @property
    def divisor(self) -> int:
        """The number that both sides of a batch must be multiples of, at least torchvision's 32."""
        return math.lcm(_COARSEST, *self.strides[: len(self.names)])


def build_pyramid(name: str, *, finest: int, pooled: bool, channels: int, norm: Norm, pretrained: bool) -> Pyramid:
    """Build a backbone and a feature pyramid on its stages with strides of `finest` to 32.

    Args:
        name: of a ResNet, ResNeXt, Wide ResNet, MobileNet, EfficientNet or ConvNeXt of torchvision, as it is called
            there, or "timm/NAME" for any model of timm that returns its features.
        finest: smallest stride; of several stages with one stride the last is taken.
        pooled: end in a max pooling to one more level ("pool"), as Faster R-CNN does; else in two strided convolutions
            to two more ("p6", "p7"), as RetinaNet and FCOS do.
        channels: of every level.
        norm: normalisation of the backbone; "auto" is "frozen" if pretrained and "batch" if not.
        pretrained: load the published weights of the backbone, trained on ImageNet.

    Raises:
        ValueError: if there is no such backbone, it has no stage of such a stride, or `norm` would discard weights.
    """
    if norm == "group" and pretrained:
        raise ValueError(
            f"norm 'group' would discard the statistics that the pretrained weights of backbone '{name}' rely on: "
            "choose 'frozen' or 'batch', or leave pretrained_backbone out"
        )
    if norm == "auto":
        norm = "frozen" if pretrained else "batch"
    blocks = require("torchvision.ops.feature_pyramid_network", "train", f"backbone '{name}'")
    extra = blocks.LastLevelMaxPool() if pooled else blocks.LastLevelP6P7(channels, channels)
    if name.startswith("timm/"):
        net, strides, widths = _timm(name, pretrained)
    else:
        net, stages, strides, widths = _torchvision(name, pretrained)
    chosen = [i for i, stride in enumerate(strides) if finest <= stride <= _COARSEST and stride not in strides[i + 1 :]]
    if not chosen:
        raise ValueError(
            f"backbone '{name}' has features at strides {', '.join(map(str, strides))}, none of {finest} to "
            f"{_COARSEST}: choose another"
        )
    set_norm(net, norm)
    names = tuple(str(level) for level in range(len(chosen)))
    levels = [widths[i] for i in chosen]
    if name.startswith("timm/"):
        pyramid = blocks.FeaturePyramidNetwork(levels, channels, extra_blocks=extra)
        backbone: nn.Module = TimmPyramid(net, tuple(chosen), pyramid, channels)
    else:
        utils = require("torchvision.models.detection.backbone_utils", "train", f"backbone '{name}'")
        taken = {stages[i]: level for level, i in zip(names, chosen, strict=True)}
        backbone = utils.BackboneWithFPN(net, taken, levels, channels, extra_blocks=extra)
    last = strides[chosen[-1]]
    own = [strides[i] for i in chosen]
    return Pyramid(backbone, names, (*own, 2 * last) if pooled else (*own, 2 * last, 4 * last))


def backbone_names() -> list[str]:
    """Return the names of torchvision's backbones that `build_pyramid` takes; those of timm are too many to try."""
    return [name for name in torchvision_names() if name.startswith(_RESNETS + _SEQUENCES)]


class TimmPyramid(nn.Module):
    """A timm model that returns its features, and a feature pyramid on some of them.

    Args:
        body: returns a list of maps, (B, C, h, w) or (B, h, w, C) according to its `output_fmt`.
        chosen: positions in that list, from the finest on.
        fpn: torchvision's pyramid, from a mapping of maps to a mapping of maps.
        channels: of every level that the pyramid returns.
    """

    def __init__(self, body: nn.Module, chosen: Sequence[int], fpn: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.chosen = tuple(chosen)
        self.out_channels = channels
        # A format is an enumeration, or for networks of convolutions often not said.
        layout = getattr(body, "output_fmt", None)
        self.channels_last = getattr(layout, "value", layout) == "NHWC"

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the levels by name for images (B, 3, H, W)."""
        maps = self.body(images)
        taken = [maps[i].permute(0, 3, 1, 2) if self.channels_last else maps[i] for i in self.chosen]
        levels: OrderedDict[str, Tensor] = self.fpn(OrderedDict((str(i), map_) for i, map_ in enumerate(taken)))
        return levels


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, list[str], list[int], list[int]]:
    builder = name.partition(".")[0]
    if builder not in backbone_names():
        timm = f"; timm may have it as 'timm/{builder}'" if builder in torchvision_names() else ""
        raise ValueError(
            f"backbone '{name}' is unknown; {nearest(builder, backbone_names())}{timm}. "
            f"Known are {', '.join(_RESNETS + _SEQUENCES)} networks of torchvision, and timm/NAME."
        )
    model = build_torchvision(name, None, None, pretrained)
    if builder.startswith(_RESNETS):
        width = model.fc.in_features // 8  # type: ignore[union-attr, operator]
        return model, [f"layer{i}" for i in range(1, 5)], [4, 8, 16, 32], [width * 2**i for i in range(4)]
    net = model.get_submodule("features")
    strides, widths = [], []
    x = torch.zeros(1, 3, 64, 64)
    mode = net.training
    net.eval()
    with torch.no_grad():
        for stage in net.children():
            x = stage(x)
            strides.append(64 // x.shape[-1])
            widths.append(x.shape[1])
    net.train(mode)
    return net, [stage for stage, _ in net.named_children()], strides, widths


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, list[int], list[int]]:
    timm = require("timm", "train", f"backbone '{name}'")
    rest = name.removeprefix("timm/")
    architecture = rest.partition(".")[0]
    if ":" not in rest and not timm.is_model(architecture):
        raise ValueError(
            f"backbone '{name}' is unknown to timm {timm.__version__}; {nearest(architecture, timm_names())}. "
            "diffkd.models.model_names('timm') lists all."
        )
    # Transformers are built for one size of image unless told, each in its own words; others know neither.
    for option in ({"strict_img_size": False}, {"dynamic_img_size": True}, {}):
        try:
            net = timm.create_model(rest, pretrained=pretrained, features_only=True, **option)
            break
        except TypeError:
            if not option:
                raise
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise ValueError(
                f"backbone '{name}' cannot be built ({reason}): take a model that timm builds with features_only, "
                f"with published weights if they are asked for"
            ) from error
    return net, list(net.feature_info.reduction()), list(net.feature_info.channels())
