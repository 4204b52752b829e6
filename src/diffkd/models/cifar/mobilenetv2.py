"""MobileNetV2 (Sandler et al. 2018) for small images, with plain ReLU as in the CRD benchmark."""

from torch import Tensor, nn

from diffkd.models.cifar.resnet import kaiming_init

# (expansion, channels at width 1, blocks, stride) of each stage: Table 2 of the paper, with the second stage at stride
# one, so that a 32x32 image ends as a 2x2 map.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1 without activation; a shortcut where shapes allow.

    Args:
        in_channels: channels of the input (B, in_channels, H, W).
        channels: channels of the output (B, channels, H / stride, W / stride).
        stride: of the 3x3 convolution.
        expansion: hidden channels per input channel.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.expand = _conv_norm_relu(in_channels, hidden, kernel_size=1)
        self.depthwise = _conv_norm_relu(hidden, hidden, kernel_size=3, stride=stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection, added to the input where the block has a shortcut."""
        output: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + output if self.has_shortcut else output


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 whose last map has a sixteenth of the resolution: 2x2 for a 32x32 image.

    Args:
        width: factor on the channels of stem and stages; the head keeps 1280 channels up to width 1.
        num_classes: length of the output.
        in_channels: channels of the images, which may have any height and width.

    Raises:
        ValueError: if width leaves a stage without channels.
    """

    def __init__(self, width: float = 0.5, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        if int(16 * width) < 1:
            raise ValueError(f"width {width} leaves the first stage without channels: it must be at least 1/16")
        channels = int(32 * width)
        self.stem = _conv_norm_relu(in_channels, channels, kernel_size=3, stride=2)
        stages = []
        for expansion, full_width, blocks, stride in _STAGES:
            stages.append(_stage(channels, int(full_width * width), blocks, stride, expansion))
            channels = int(full_width * width)
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5, self.layer6, self.layer7 = stages
        head_channels = int(1280 * max(1.0, width))
        self.head = _conv_norm_relu(channels, head_channels, kernel_size=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(head_channels, num_classes)
        kaiming_init(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_channels, H, W)."""
        features = self.layer3(self.layer2(self.layer1(self.stem(images))))
        features = self.layer7(self.layer6(self.layer5(self.layer4(features))))
        logits: Tensor = self.fc(self.avgpool(self.head(features)).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int, expansion: int) -> nn.Sequential:
    following = [InvertedResidual(channels, channels, 1, expansion) for _ in range(blocks - 1)]
    return nn.Sequential(InvertedResidual(in_channels, channels, stride, expansion), *following)


def _conv_norm_relu(
    in_channels: int, channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(
        in_channels, channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


def mobilenetv2(num_classes: int = 100, in_channels: int = 3, width: float = 0.5) -> CifarMobileNetV2:
    """Return MobileNetV2 for small images (0.81 M parameters at width 0.5)."""
    return CifarMobileNetV2(width, num_classes, in_channels)
