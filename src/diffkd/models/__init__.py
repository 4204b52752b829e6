"""Models: networks for small images, and any model of timm, torchvision, transformers or the user's own by name."""

from diffkd.models.any_size import AnySize, stride_of, upsample
from diffkd.models.cifar_mobilenetv2 import CifarMobileNetV2, mobilenetv2
from diffkd.models.cifar_resnet import (
    CifarResNet,
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from diffkd.models.cifar_resnet50 import CifarResNet50, resnet50
from diffkd.models.cifar_shufflenetv1 import CifarShuffleNetV1, shufflenetv1
from diffkd.models.cifar_shufflenetv2 import CifarShuffleNetV2, shufflenetv2
from diffkd.models.compact_resnet import compact_resnet8, compact_resnet14
from diffkd.models.load import load_model, model_names
from diffkd.models.load_segmenter import load_segmenter
from diffkd.models.normalization import Normalization, input_normalization
from diffkd.models.wide_resnet import WideResNet, wrn_16_1, wrn_16_2, wrn_28_10, wrn_40_1, wrn_40_2

__all__ = [
    "AnySize",
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarResNet50",
    "CifarShuffleNetV1",
    "CifarShuffleNetV2",
    "Normalization",
    "WideResNet",
    "compact_resnet8",
    "compact_resnet14",
    "input_normalization",
    "load_model",
    "load_segmenter",
    "mobilenetv2",
    "model_names",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "shufflenetv1",
    "shufflenetv2",
    "stride_of",
    "upsample",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_28_10",
    "wrn_40_1",
    "wrn_40_2",
]
