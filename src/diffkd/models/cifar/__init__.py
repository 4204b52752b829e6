"""The networks for small images by name: those of the CIFAR-100 benchmark, Table 9 of the DiffKD paper."""

from collections.abc import Callable

from torch import nn

from diffkd.models.cifar import mobilenetv2, resnet, resnet50, shufflenetv1, shufflenetv2, wide_resnet
from diffkd.models.extras import nearest

_BUILDERS: tuple[Callable[..., nn.Module], ...] = (
    resnet.resnet8,
    resnet.resnet14,
    resnet.resnet20,
    resnet.resnet32,
    resnet.resnet44,
    resnet.resnet56,
    resnet.resnet110,
    resnet.resnet8x4,
    resnet.resnet32x4,
    resnet50.resnet50,
    wide_resnet.wrn_16_1,
    wide_resnet.wrn_16_2,
    wide_resnet.wrn_28_10,
    wide_resnet.wrn_40_1,
    wide_resnet.wrn_40_2,
    mobilenetv2.mobilenetv2,
    shufflenetv1.shufflenetv1,
    shufflenetv2.shufflenetv2,
    resnet.compact_resnet8,
    resnet.compact_resnet14,
)


def cifar_names() -> list[str]:
    """Return the names of all networks for small images, "resnet8" to "shufflenetv2"."""
    return [builder.__name__ for builder in _BUILDERS]


def build_cifar(name: str, num_classes: int | None, in_channels: int | None, pretrained: bool) -> nn.Module:
    """Build a network for small images with random weights.

    Args:
        name: one of `cifar_names()`.
        num_classes: length of the output; None for 100.
        in_channels: channels of the images; None for 3.
        pretrained: refused, as no weights are published with these networks.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: if the name is unknown or pretrained weights are asked for.
    """
    found = [builder for builder in _BUILDERS if builder.__name__ == name]
    if not found:
        raise ValueError(
            f"model 'cifar/{name}' is unknown; {nearest(name, cifar_names())}. "
            "diffkd.models.model_names('cifar') lists all."
        )
    if pretrained:
        raise ValueError(
            f"model 'cifar/{name}' has no published weights: train it first and pass their file as weights, "
            "or set pretrained to False"
        )
    return found[0](
        num_classes=100 if num_classes is None else num_classes, in_channels=3 if in_channels is None else in_channels
    )
