"""Wide residual networks (Zagoruyko and Komodakis 2016): pre-activation basic blocks for small images."""

from torch import Tensor, nn

from diffkd.models.cifar.resnet import kaiming_init


class PreActivationBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, around a shortcut; the sum leaves the block without activation.

    Args:
        in_channels: channels of the input (B, in_channels, H, W).
        channels: channels of the output (B, channels, H / stride, W / stride).
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of branch and shortcut; a convolutional shortcut starts from the activated input."""
        activated = self.relu1(self.norm1(x))
        branch: Tensor = self.conv2(self.relu2(self.norm2(self.conv1(activated))))
        return branch + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """A wide ResNet with three stages, at full, half and quarter resolution, and a last norm and ReLU.

    Args:
        depth: number of layers on the longest path, 6 n + 4 with n blocks in each stage.
        widen_factor: k; the stages have 16 k, 32 k and 64 k channels.
        num_classes: length of the output.
        in_channels: channels of the images, which may have any height and width.

    Raises:
        ValueError: if depth is not 6 n + 4 with n >= 1, or widen_factor is below one.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth {depth} is not 6 n + 4, as three stages of n blocks need: try 10, 16, 28 or 40")
        if widen_factor < 1:
            raise ValueError(f"widen_factor {widen_factor} leaves no channels: it must be at least 1")
        blocks = (depth - 4) // 6
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.layer1 = _stage(16, widths[0], blocks, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.norm = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)
        kaiming_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_channels, H, W)."""
        features = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        features = self.relu(self.norm(features))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    following = [PreActivationBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(PreActivationBlock(in_channels, channels, stride), *following)


def wrn_16_1(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """Return WRN-16-1 (0.18 M parameters)."""
    return WideResNet(16, 1, num_classes, in_channels)


def wrn_16_2(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """Return WRN-16-2 (0.70 M parameters)."""
    return WideResNet(16, 2, num_classes, in_channels)


def wrn_28_10(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """Return WRN-28-10 (36.5 M parameters)."""
    return WideResNet(28, 10, num_classes, in_channels)


def wrn_40_1(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """Return WRN-40-1 (0.57 M parameters)."""
    return WideResNet(40, 1, num_classes, in_channels)


def wrn_40_2(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """Return WRN-40-2 (2.26 M parameters)."""
    return WideResNet(40, 2, num_classes, in_channels)
