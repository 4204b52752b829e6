"""The initialisation that all networks of this room share."""

from torch import nn


def kaiming_init(model: nn.Module) -> None:
    """Fill convolutions with Kaiming normal weights (fan-out, He et al. 2015) and batch norms with ones and zeros.

    Args:
        model: changed in place; linear layers keep PyTorch's own initialisation.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
