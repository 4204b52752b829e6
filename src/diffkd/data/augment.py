"""Augmentation of whole batches on their own device: each image draws its own numbers, the host never waits."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffkd.data.augmentation import Augmentation
from diffkd.data.rand_augment import grayscale, rand_augment


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Pad each image with zeros and crop it back to its size at a place of its own.

    Args:
        images: (B, C, H, W), any dtype.
        padding: pixels added on each side.
        generator: source of the (B, 2) offsets, on the images' device.

    Returns:
        (B, C, H, W), dtype unchanged.
    """
    batch, channels, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator, device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)  # (B, H) rows of the padded image
    columns = offsets[1] + torch.arange(width, device=images.device)  # (B, W)
    padded = F.pad(images, [padding] * 4)  # (B, C, H + 2p, W + 2p)
    cropped = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))  # (B, C, H, W + 2p)
    return cropped.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: (B, C, H, W), any dtype.
        generator: source of the B coins, on the images' device.

    Returns:
        (B, C, H, W), dtype unchanged.
    """
    coins = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    return torch.where(coins < 0.5, images.flip(-1), images)


def color_jitter(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """Scale brightness, then contrast, then saturation of each image by factors of its own.

    Args:
        images: (B, C, H, W) floats in [0, 1]; saturation changes for C = 3 only.
        strength: each factor is uniform in [1 - strength, 1 + strength].
        generator: source of the (3, B) factors, on the images' device.

    Returns:
        (B, C, H, W) floats in [0, 1].
    """
    draws = torch.rand(3, len(images), 1, 1, 1, generator=generator, device=images.device)
    brightness, contrast, saturation = 1 + strength * (2 * draws - 1)
    images = (images * brightness).clamp(0, 1)
    mean = grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(mean.expand_as(images), images, contrast).clamp(0, 1)
    return torch.lerp(grayscale(images).expand_as(images), images, saturation).clamp(0, 1)


def random_erasing(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """Fill a random rectangle of some images with standard normal noise (Zhong et al., 2020, arXiv 1708.04896).

    The area is uniform in 2 % to 33 % of the image and the aspect ratio log-uniform in 0.3 to 3.3, as in torchvision.
    Of ten draws the first that fits is taken; if none fits the image is left alone.

    Args:
        images: (B, C, H, W) normalised floats.
        probability: chance that an image is erased.
        generator: source of all draws, on the images' device.

    Returns:
        (B, C, H, W) floats.
    """
    batch, _, height, width = images.shape
    device = images.device
    coin, top, left = torch.rand(3, batch, generator=generator, device=device)
    area, aspect = torch.rand(2, batch, 10, generator=generator, device=device)
    area = (0.02 + (0.33 - 0.02) * area) * height * width
    aspect = torch.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * aspect)
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (B, 10) rectangle sizes in pixels
    fits = (tall < height) & (wide < width)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)  # (B, 1)
    tall, wide, fits = tall.gather(1, first), wide.gather(1, first), fits.gather(1, first)
    top = (top[:, None] * (height - tall + 1)).floor()
    left = (left[:, None] * (width - wide + 1)).floor()
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    in_rows = (rows >= top) & (rows < top + tall)  # (B, H)
    in_columns = (columns >= left) & (columns < left + wide)  # (B, W)
    erased = (coin[:, None] < probability) & fits  # (B, 1)
    mask = erased[:, :, None] & in_rows[:, :, None] & in_columns[:, None, :]  # (B, H, W)
    noise = torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype)
    return torch.where(mask[:, None], noise, images)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean and divide by the standard deviation, channel by channel.

    Args:
        images: (B, C, H, W) floats.
        mean: (C, 1, 1), in the images' unit.
        std: (C, 1, 1), in the images' unit.

    Returns:
        (B, C, H, W) floats.
    """
    return (images - mean) / std


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 images into float32 in [0, 1]; floats keep their values and become float32."""
    return images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images.to(torch.float32)


def augment(images: Tensor, augmentation: Augmentation, mean: Tensor, std: Tensor, generator: Generator) -> Tensor:
    """Augment and normalise one training batch, in the order that `Augmentation` documents.

    Args:
        images: (B, C, H, W) uint8, or floats if neither RandAugment nor colour jitter is on.
        augmentation: what to do; Mixup and CutMix are not done here.
        mean: (C, 1, 1), in units of [0, 1] for uint8 images.
        std: (C, 1, 1), likewise.
        generator: source of all draws, on the images' device.

    Returns:
        (B, C, H, W) float32, normalised.
    """
    if augmentation.crop_padding:
        images = random_crop(images, augmentation.crop_padding, generator)
    if augmentation.flip:
        images = random_flip(images, generator)
    if augmentation.rand_augment:
        images = rand_augment(images, augmentation.rand_augment, augmentation.rand_augment_magnitude, generator)
    images = to_float(images)
    if augmentation.color_jitter:
        images = color_jitter(images, augmentation.color_jitter, generator)
    images = normalise(images, mean, std)
    if augmentation.random_erasing:
        images = random_erasing(images, augmentation.random_erasing, generator)
    return images
