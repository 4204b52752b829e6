"""Models: networks for small images, and any model of timm, torchvision, transformers or the user's own by name."""

from diffkd.models.backbones import load_backbone
from diffkd.models.cifar.mobilenetv2 import CifarMobileNetV2, mobilenetv2
from diffkd.models.cifar.resnet import (
    CifarResNet,
    compact_resnet8,
    compact_resnet14,
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
from diffkd.models.cifar.resnet50 import CifarResNet50, resnet50
from diffkd.models.cifar.shufflenetv1 import CifarShuffleNetV1, shufflenetv1
from diffkd.models.cifar.shufflenetv2 import CifarShuffleNetV2, shufflenetv2
from diffkd.models.cifar.wide_resnet import WideResNet, wrn_16_1, wrn_16_2, wrn_28_10, wrn_40_1, wrn_40_2
from diffkd.models.detectors.load import load_detector
from diffkd.models.detectors.teacher import DetectorTeacher
from diffkd.models.load import load_model, model_names
from diffkd.models.normalization import Normalization, input_normalization
from diffkd.models.segmenters.any_size import AnySize, stride_of, upsample
from diffkd.models.segmenters.load import load_segmenter
from diffkd.models.sparse_attention import InContextSparseAttention
from diffkd.models.sparse_transformers import sparse

__all__ = [
    "AnySize",
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarResNet50",
    "CifarShuffleNetV1",
    "CifarShuffleNetV2",
    "DetectorTeacher",
    "InContextSparseAttention",
    "Normalization",
    "WideResNet",
    "compact_resnet8",
    "compact_resnet14",
    "input_normalization",
    "load_backbone",
    "load_detector",
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
    "sparse",
    "stride_of",
    "upsample",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_28_10",
    "wrn_40_1",
    "wrn_40_2",
]
