"""A U-Net as it denoises images, in place of DiffKD's light denoiser (Table 12 of the paper).

The paper says of its own that it has 13.62 million parameters; this one, diffusers' with three levels and no attention,
has 14.7 million for 256 channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.diffusion.modules import Denoiser

LEVELS = (64, 128, 256)


class UNetDenoiser(nn.Module):
    """Predict the noise in a map (B, C, H, W) of any size by a U-Net.

    Args:
        channels: C.
        levels: channels of the U-Net, each level at half the resolution of the one before.

    Raises:
        ModuleNotFoundError: if diffusers is not installed.
    """

    def __init__(self, channels: int, levels: tuple[int, ...] = LEVELS) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ModuleNotFoundError:
            raise ModuleNotFoundError("the U-Net is of diffusers: run it by uv run --group bench") from None
        self.multiple = 2 ** (len(levels) - 1)
        self.network = UNet2DModel(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=levels,
            down_block_types=("DownBlock2D",) * len(levels),
            up_block_types=("UpBlock2D",) * len(levels),
            add_attention=False,
        )

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the noise in `noisy`, (B, C, H, W), at `timesteps`, (B,)."""
        height, width = noisy.shape[2:]
        padded = F.pad(noisy, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        predicted: Tensor = self.network(padded, timesteps).sample
        return predicted[..., :height, :width]


def unet(channels: int, is_map: bool) -> nn.Module:
    """Return a U-Net for maps; vectors, which have no positions, keep the light denoiser."""
    return UNetDenoiser(channels) if is_map else Denoiser(channels, is_map=False)
