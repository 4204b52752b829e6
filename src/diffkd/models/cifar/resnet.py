"""ResNets for small images (He et al. 2016, section 4.2) and their four times wider relatives of the CRD benchmark."""

from torch import Tensor, nn


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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; the last ReLU's output is the block's output.

    Args:
        in_channels: channels of the input (B, in_channels, H, W).
        channels: channels of the output (B, channels, H / stride, W / stride).
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated sum of branch and shortcut."""
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        output: Tensor = self.relu2(branch + self.downsample(x))
        return output


class CifarResNet(nn.Module):
    """A ResNet with a 3x3 stem and three stages of basic blocks, at full, half and quarter resolution.

    Args:
        depth: number of layers on the longest path, 6 n + 2 with n blocks in each stage.
        widths: channels of the stem and of the three stages.
        num_classes: length of the output.
        in_channels: channels of the images, which may have any height and width.
        stem_stride: stride of the first convolution; 2 makes everything after it four times cheaper.

    Raises:
        ValueError: if depth is not 6 n + 2 with n >= 1.
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int],
        num_classes: int = 100,
        in_channels: int = 3,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth {depth} is not 6 n + 2, as three stages of n basic blocks need: try 8, 14 or 20")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        kaiming_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_channels, H, W)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    following = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_channels, channels, stride), *following)


def _widths(width: int) -> tuple[int, int, int, int]:
    return width, width, 2 * width, 4 * width


def resnet8(num_classes: int = 100, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Return ResNet-8: 0.08 M parameters, or 0.02 M at width 8; width is that of the stem and the first stage."""
    return CifarResNet(8, _widths(width), num_classes, in_channels)


def resnet14(num_classes: int = 100, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Return ResNet-14 (0.18 M parameters); width is that of the stem and the first stage."""
    return CifarResNet(14, _widths(width), num_classes, in_channels)


def resnet20(num_classes: int = 100, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Return ResNet-20 (0.28 M parameters); width is that of the stem and the first stage."""
    return CifarResNet(20, _widths(width), num_classes, in_channels)


def resnet32(num_classes: int = 100, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Return ResNet-32 (0.47 M parameters); width is that of the stem and the first stage."""
    return CifarResNet(32, _widths(width), num_classes, in_channels)


def resnet44(num_classes: int = 100, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Return ResNet-44 (0.67 M parameters); width is that of the stem and the first stage."""
    return CifarResNet(44, _widths(width), num_classes, in_channels)


def resnet56(num_classes: int = 100, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Return ResNet-56 (0.86 M parameters); width is that of the stem and the first stage."""
    return CifarResNet(56, _widths(width), num_classes, in_channels)


def resnet110(num_classes: int = 100, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Return ResNet-110 (1.74 M parameters); width is that of the stem and the first stage."""
    return CifarResNet(110, _widths(width), num_classes, in_channels)


def resnet8x4(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return ResNet-8x4 (1.23 M parameters): a stem of 32 and stages of 64, 128 and 256 channels."""
    return CifarResNet(8, (32, 64, 128, 256), num_classes, in_channels)


def resnet32x4(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return ResNet-32x4 (7.43 M parameters): a stem of 32 and stages of 64, 128 and 256 channels."""
    return CifarResNet(32, (32, 64, 128, 256), num_classes, in_channels)


def compact_resnet8(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return ResNet-8 with a stride-2 stem and widths 8, 16 and 32 (0.02 M parameters)."""
    return CifarResNet(8, (8, 8, 16, 32), num_classes, in_channels, stem_stride=2)


def compact_resnet14(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return ResNet-14 with a stride-2 stem and widths 16, 32 and 64 (0.18 M parameters)."""
    return CifarResNet(14, (16, 16, 32, 64), num_classes, in_channels, stem_stride=2)
