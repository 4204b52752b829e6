"""RandAugment for a whole batch at once: all operations are computed for all images, then one is selected per image."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

_OPERATIONS = 14
_IDENTITY, _SHEAR_X, _SHEAR_Y, _MOVE_X, _MOVE_Y, _ROTATE = range(6)
_BRIGHTNESS, _COLOR, _CONTRAST, _SHARPNESS, _POSTERIZE, _SOLARIZE, _AUTOCONTRAST, _EQUALIZE = range(6, _OPERATIONS)


def rand_augment(images: Tensor, operations: int, magnitude: int, generator: Generator) -> Tensor:
    """Apply random operations per image in sequence (RandAugment, Cubuk et al., 2020, arXiv 1909.13719).

    The fourteen operations and their strengths are those of `torchvision.transforms.v2.RandAugment` with 31 bins,
    nearest interpolation and black fill. All fourteen are computed for all images: for small images that costs less
    than a synchronisation with the host to read the chosen operations.

    Args:
        images: (B, C, H, W) uint8; colour changes for C = 3 only.
        operations: operations per image.
        magnitude: strength on a scale of 0 to 30.
        generator: source of all draws, on the images' device.

    Returns:
        (B, C, H, W) uint8.
    """
    for _ in range(operations):
        chosen = torch.randint(_OPERATIONS, (len(images),), generator=generator, device=images.device)
        coins = torch.rand(len(images), generator=generator, device=images.device)
        images = apply_operations(images, chosen, torch.where(coins < 0.5, -1.0, 1.0), magnitude)
    return images


def apply_operations(images: Tensor, chosen: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Apply one operation to each image.

    Args:
        images: (B, C, H, W) uint8.
        chosen: (B,) int64 in 0..13: identity, shear x, shear y, translate x, translate y, rotate, brightness, colour,
            contrast, sharpness, posterize, solarize, auto-contrast, equalize.
        sign: (B,) floats, -1 or 1: direction of the change, for the operations that have one.
        magnitude: strength on a scale of 0 to 30.

    Returns:
        (B, C, H, W) uint8.
    """
    strength = magnitude / 30
    pixels = images.to(torch.float32)
    factor = 1 + 0.9 * strength * sign[:, None, None, None]
    gray = grayscale(pixels).floor()
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    results = {
        _BRIGHTNESS: (pixels * factor).clamp(0, 255),
        _COLOR: _blend(gray, pixels, factor) if images.shape[1] == 3 else pixels,
        _CONTRAST: _blend(mean, pixels, factor),
        _SHARPNESS: _blend(_blur(pixels), pixels, factor),
        _POSTERIZE: _posterize(images, bits=round(8 - 4 * strength)),
        _SOLARIZE: torch.where(pixels >= 255 * (1 - strength), 255 - pixels, pixels),
        _AUTOCONTRAST: _autocontrast(pixels),
        _EQUALIZE: _equalize(images),
    }
    kind = chosen[:, None, None, None]
    output = torch.where((kind >= _SHEAR_X) & (kind <= _ROTATE), _warp(pixels, chosen, sign, strength), pixels)
    for operation, result in results.items():
        output = torch.where(kind == operation, result, output)
    return output.to(torch.uint8)


def grayscale(images: Tensor) -> Tensor:
    """Return the luma (ITU-R BT.601) of (B, 3, H, W) floats as (B, 1, H, W); other channel counts are averaged."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _blend(start: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return (factor * images + (1 - factor) * start).clamp(0, 255)


def _warp(pixels: Tensor, chosen: Tensor, sign: Tensor, strength: float) -> Tensor:
    """Apply each image's affine map, given from output to input coordinates in pixels."""
    _, _, height, width = pixels.shape
    one, zero = torch.ones_like(sign), torch.zeros_like(sign)
    shear = 0.3 * strength * sign
    angle = math.radians(30) * strength * sign
    turns = chosen == _ROTATE
    cosine, sine = torch.where(turns, angle.cos(), one), torch.where(turns, angle.sin(), zero)
    shear_x, shear_y = torch.where(chosen == _SHEAR_X, shear, zero), torch.where(chosen == _SHEAR_Y, shear, zero)
    # A shift by half an image turns a shear about the centre into one about the top left corner.
    shift_x = torch.where(chosen == _MOVE_X, -(150 / 331 * width * strength * sign).trunc(), shear_x * height / 2)
    shift_y = torch.where(chosen == _MOVE_Y, -(150 / 331 * height * strength * sign).trunc(), shear_y * width / 2)
    x = torch.arange(width, device=pixels.device) - (width - 1) / 2
    y = torch.arange(height, device=pixels.device)[:, None] - (height - 1) / 2
    cosine, sine, shear_x, shear_y, shift_x, shift_y = (
        value[:, None, None] for value in (cosine, sine, shear_x, shear_y, shift_x, shift_y)
    )
    from_x = cosine * x + (shear_x - sine) * y + shift_x  # (B, H, W)
    from_y = (shear_y + sine) * x + cosine * y + shift_y
    grid = torch.stack([from_x * 2 / width, from_y * 2 / height], dim=-1)  # (B, H, W, 2) in [-1, 1]
    return F.grid_sample(pixels, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _blur(pixels: Tensor) -> Tensor:
    """Smooth with the 3x3 kernel of ones with 5 in the centre, rounded; border pixels do not change."""
    channels = pixels.shape[1]
    kernel = torch.ones(channels, 1, 3, 3, device=pixels.device) / 13
    kernel[:, :, 1, 1] = 5 / 13
    if min(pixels.shape[2:]) < 3:
        return pixels
    inner = F.conv2d(pixels, kernel, groups=channels).round()
    blurred = pixels.clone()
    blurred[:, :, 1:-1, 1:-1] = inner
    return blurred


def _posterize(images: Tensor, bits: int) -> Tensor:
    return (images & (0xFF << (8 - bits) & 0xFF)).to(torch.float32)


def _autocontrast(pixels: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a constant channel does not change."""
    low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1.0, 255 / torch.where(flat, 1.0, high - low))
    return ((pixels - torch.where(flat, 0.0, low)) * scale).clamp(0, 255)


def _equalize(images: Tensor) -> Tensor:
    """Equalise the histogram of each channel with PIL's integer arithmetic."""
    flat = images.flatten(2).to(torch.int64)  # (B, C, H * W)
    counts = flat.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, torch.ones_like(flat))
    below = counts.cumsum(dim=2)
    last = counts.gather(2, below.argmax(dim=2, keepdim=True))  # pixels of the brightest value present
    step = (flat.shape[2] - last) // 255  # (B, C, 1)
    table = (below - counts + step // 2) // step.clamp(min=1)
    equalized = table.clamp(0, 255).gather(2, flat)
    return torch.where(step > 0, equalized, flat).view(images.shape).to(torch.float32)
