"""Small networks of every kind that the distiller must understand, all with three input channels unless said."""

import torch
from torch import Tensor, nn


def conv_block(channels_in: int, channels_out: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)
    )


class ConvNet(nn.Module):
    """Two stages of convolutions; `norm=False` leaves the batch normalisation out."""

    def __init__(self, width: int = 4, classes: int = 10, norm: bool = True) -> None:
        super().__init__()
        self.stem = conv_block(3, width)
        self.stage = conv_block(width, 2 * width)
        if not norm:
            self.stem[1], self.stage[1] = nn.Identity(), nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.stage(self.stem(images))).flatten(1))


class TokenNet(nn.Module):
    """Patches of 4x4 pixels as tokens, after `prefix` learned ones, through two layers; their mean is classified."""

    def __init__(self, width: int = 8, classes: int = 10, prefix: int = 1, tell: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, prefix, width))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2)))
        self.head = nn.Linear(width, classes)
        if tell:
            self.num_prefix_tokens = prefix

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.blocks(torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1))
        return self.head(tokens.mean(dim=1))


class ChannelsLastNet(nn.Module):
    """Patches as (B, H, W, C), as in Swin."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.block = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.patches(images).permute(0, 2, 3, 1)).mean(dim=(1, 2)))


class MLP(nn.Module):
    """Flat vectors in, three layers."""

    def __init__(self, inputs: int = 12, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width // 2)
        self.last = nn.Linear(width // 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x.flatten(1)).relu()).relu())


class Pyramid(nn.Module):
    """Returns several maps from one layer, as a tuple and as a dict, and a dict at the end."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = conv_block(3, width)
        self.levels = _Levels(width)
        self.named = _Named()
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine, coarse = self.levels(self.stem(images))
        named = self.named(fine, coarse)
        return {"features": named["coarse"], "logits": self.fc(coarse.mean(dim=(2, 3)))}


class _Levels(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = conv_block(width, 2 * width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 1.0, self.down(x)


class _Named(nn.Module):
    def forward(self, fine: Tensor, coarse: Tensor) -> dict[str, Tensor]:
        return {"fine": fine * 1.0, "coarse": coarse * 1.0}


class Wrapped(nn.Module):
    """Everything of a net inside one attribute, as users' wrappers have it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Sequential(net))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class Twice(nn.Module):
    """Runs one layer twice in a forward."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = conv_block(3, width)
        self.shared = nn.Conv2d(width, width, 3, padding=1)
        self.around = nn.Identity()
        self.fc = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.around(self.shared(self.shared(self.stem(images))))
        return self.fc(x.mean(dim=(2, 3)))


class TwoInputs(nn.Module):
    """Takes an image and a vector, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = ConvNet(), nn.Linear(5, 10)

    def forward(self, pixels: Tensor, extra: Tensor) -> Tensor:
        return self.image(pixels) + self.vector(extra)
