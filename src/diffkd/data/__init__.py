"""Data modules for classification, detection and segmentation, their loaders and their augmentation."""

from diffkd.data.classification.arrays import Arrays
from diffkd.data.classification.augmentation import Augmentation, mix
from diffkd.data.classification.cifar import Cifar
from diffkd.data.classification.device_loader import DeviceLoader
from diffkd.data.classification.fashion_mnist import FashionMNIST, FashionPairs, FashionSubset
from diffkd.data.classification.image_folder import ImageFolder
from diffkd.data.detection.augmentation import BoxAugmentation
from diffkd.data.detection.coco import CocoDetection
from diffkd.data.detection.voc import VocDetection
from diffkd.data.detection.yolo import YoloDetection
from diffkd.data.held_out import hold_out
from diffkd.data.scenes.detection import DetectionScenes
from diffkd.data.scenes.segmentation import SegmentationScenes
from diffkd.data.seeding import mix_seed
from diffkd.data.segmentation.ade20k import Ade20k
from diffkd.data.segmentation.cityscapes import Cityscapes
from diffkd.data.segmentation.mask_folder import MaskFolder
from diffkd.data.segmentation.palette import palette
from diffkd.data.segmentation.transform import SegmentationAugmentation
from diffkd.data.segmentation.voc import VocSegmentation
from diffkd.data.unlabelled import UnlabelledFolder

__all__ = [
    "Ade20k",
    "Arrays",
    "Augmentation",
    "BoxAugmentation",
    "Cifar",
    "Cityscapes",
    "CocoDetection",
    "DetectionScenes",
    "DeviceLoader",
    "FashionMNIST",
    "FashionPairs",
    "FashionSubset",
    "ImageFolder",
    "MaskFolder",
    "SegmentationAugmentation",
    "SegmentationScenes",
    "UnlabelledFolder",
    "VocDetection",
    "VocSegmentation",
    "YoloDetection",
    "hold_out",
    "mix",
    "mix_seed",
    "palette",
]
