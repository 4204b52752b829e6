"""A small vision transformer for images of 28x28, by the number of its tokens, with full and with sparse attention."""

import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from diffkd.models import sparse

SIDES = {"coarse": 16, "full": 32}  # patches of 2x2 pixels in a row: 256 and 1,024 tokens


class SmallViT(nn.Module):
    """A vision transformer of 3 layers of width 32 behind two convolutions; its weights are those of any size.

    The map of the convolutions is enlarged to 2 x 2 pixels a patch. Without them a network this small learns for hours.

    Args:
        side: patches in a row and in a column.
        num_classes: of the output.
        in_channels: of the images.
    """

    def __init__(self, side: int, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.side = side
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.vit = VisionTransformer(
            img_size=2 * SIDES["coarse"],
            patch_size=2,
            in_chans=16,
            num_classes=num_classes,
            embed_dim=32,
            depth=3,
            num_heads=1,
            mlp_ratio=2.0,
            global_pool="avg",
            class_token=True,
            fc_norm=False,
            dynamic_img_size=True,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        size = (2 * self.side, 2 * self.side)
        logits: Tensor = self.vit(F.interpolate(self.stem(images), size, mode="bilinear", align_corners=False))
        return logits


def coarse(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Return the network on 256 tokens, on which the teacher learns first."""
    return SmallViT(SIDES["coarse"], num_classes, in_channels)


def full(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Return the network on 1,024 tokens with full attention: the teacher."""
    return SmallViT(SIDES["full"], num_classes, in_channels)


def isa(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Return the same with sparse attention, the paper's ratios, and no shortcut."""
    return sparse(full(num_classes, in_channels), shortcut=0.0)


def isa_shortcut(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Return the same with the paper's shortcut of weight 1."""
    return sparse(full(num_classes, in_channels))


def isa_quarter(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Return the same with full attention for a quarter of the query blocks instead of half, and no shortcut."""
    return sparse(full(num_classes, in_channels), shortcut=0.0, sharp_ratio=0.25)
