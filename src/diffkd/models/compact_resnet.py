"""ResNets for small images with a stride-2 stem: a quarter of the cost, for demos and tests on a CPU."""

from diffkd.models.cifar_resnet import CifarResNet


def compact_resnet8(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return ResNet-8 with a stride-2 stem and widths 8, 16 and 32 (0.02 M parameters)."""
    return CifarResNet(8, (8, 8, 16, 32), num_classes, in_channels, stem_stride=2)


def compact_resnet14(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return ResNet-14 with a stride-2 stem and widths 16, 32 and 64 (0.18 M parameters)."""
    return CifarResNet(14, (16, 16, 32, 64), num_classes, in_channels, stem_stride=2)
