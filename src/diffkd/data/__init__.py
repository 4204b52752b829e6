"""What comes in: data modules for classification, detection and segmentation, their loaders and their augmentation."""

from diffkd.data.ade20k import Ade20k
from diffkd.data.arrays import Arrays
from diffkd.data.augmentation import Augmentation
from diffkd.data.box_augmentation import BoxAugmentation
from diffkd.data.cifar import Cifar
from diffkd.data.cityscapes import Cityscapes
from diffkd.data.coco_detection import CocoDetection
from diffkd.data.detection_scenes import DetectionScenes
from diffkd.data.device_loader import DeviceLoader
from diffkd.data.fashion_mnist import FashionMNIST
from diffkd.data.fashion_subset import FashionSubset
from diffkd.data.image_folder import ImageFolder
from diffkd.data.mask_folder import MaskFolder
from diffkd.data.mixing import mix
from diffkd.data.palette import palette
from diffkd.data.seeding import mix_seed
from diffkd.data.segmentation_augmentation import SegmentationAugmentation
from diffkd.data.segmentation_scenes import SegmentationScenes
from diffkd.data.voc_detection import VocDetection
from diffkd.data.voc_segmentation import VocSegmentation
from diffkd.data.yolo_detection import YoloDetection

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
    "FashionSubset",
    "ImageFolder",
    "MaskFolder",
    "SegmentationAugmentation",
    "SegmentationScenes",
    "VocDetection",
    "VocSegmentation",
    "YoloDetection",
    "mix",
    "mix_seed",
    "palette",
]
