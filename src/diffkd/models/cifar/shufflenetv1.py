"""ShuffleNet (Zhang et al. 2018) for small images, as in the CRD benchmark: three groups, a 1x1 stem."""

import torch
from torch import Tensor, nn

from diffkd.models.cifar.resnet import kaiming_init


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3 and grouped 1x1 convolutions; a ReLU follows the depthwise one as in CRD.

    With stride 1 the branch is added to the input; with stride 2 it is joined to the average-pooled input.

    Args:
        in_channels: channels of the input (B, in_channels, H, W).
        channels: channels of the output (B, channels, H / stride, W / stride).
        stride: 1 or 2, of the depthwise convolution.
        groups: groups of the last 1x1 convolution.
        first_groups: groups of the first 1x1 convolution and of the shuffle.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        branch = channels if stride == 1 else channels - in_channels
        hidden = branch // 4
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden, branch, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated sum, or the activated pair of branch and pooled input."""
        branch = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        branch = self.relu2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        output: Tensor = self.relu3(branch + x if self.pool is None else torch.cat([branch, self.pool(x)], dim=1))
        return output


class CifarShuffleNetV1(nn.Module):
    """ShuffleNet with stages of 240, 480 and 960 channels at a half, a quarter and an eighth of the resolution.

    Args:
        num_classes: length of the output.
        in_channels: channels of the images, which may have any height and width.
    """

    def __init__(self, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        # 24 channels are too few to be grouped (section 3.2 of the paper).
        self.layer1 = _stage(24, 240, units=4, first_groups=1)
        self.layer2 = _stage(240, 480, units=8, first_groups=3)
        self.layer3 = _stage(480, 960, units=4, first_groups=3)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(960, num_classes)
        kaiming_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_channels, H, W)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, units: int, first_groups: int) -> nn.Sequential:
    following = [ShuffleUnit(channels, channels, 1, groups=3, first_groups=3) for _ in range(units - 1)]
    return nn.Sequential(ShuffleUnit(in_channels, channels, 2, groups=3, first_groups=first_groups), *following)


def shufflenetv1(num_classes: int = 100, in_channels: int = 3) -> CifarShuffleNetV1:
    """Return ShuffleNetV1 with three groups for small images (0.95 M parameters)."""
    return CifarShuffleNetV1(num_classes, in_channels)
