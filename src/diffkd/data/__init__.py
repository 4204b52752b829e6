"""What comes in: data modules for image classification, their loaders and their augmentation."""

from diffkd.data.arrays import Arrays
from diffkd.data.augmentation import Augmentation
from diffkd.data.cifar import Cifar
from diffkd.data.device_loader import DeviceLoader
from diffkd.data.fashion_mnist import FashionMNIST
from diffkd.data.fashion_subset import FashionSubset
from diffkd.data.image_folder import ImageFolder
from diffkd.data.mixing import mix
from diffkd.data.seeding import mix_seed

__all__ = [
    "Arrays",
    "Augmentation",
    "Cifar",
    "DeviceLoader",
    "FashionMNIST",
    "FashionSubset",
    "ImageFolder",
    "mix",
    "mix_seed",
]
