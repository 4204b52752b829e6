"""Augmentation of whole batches on their device, with independent draws per image; Mixup and CutMix."""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffkd.data.classification.rand_augment import grayscale, rand_augment


@dataclass(frozen=True)
class Augmentation:
    """Options of the augmentation of training images; the default changes nothing.

    The order is: crop, flip, RandAugment, colour jitter, normalisation, random erasing. Mixup and CutMix need pairs of
    images and soft labels and are applied to whole batches by the task (`diffkd.data.mix`).

    Args:
        crop_padding: pixels of zeros added on each side before a random crop back to the image's size; 0 is off. For
            images in memory; folders crop by `ImageFolder(min_crop_area=...)`.
        flip: mirror left to right with probability 1/2.
        rand_augment: RandAugment operations per image (Cubuk et al., 2020); 0 is off, 2 is usual.
        rand_augment_magnitude: their strength on a scale of 0 to 30; 9 is usual.
        color_jitter: largest relative change of brightness, contrast and saturation, each drawn from
            [1 - color_jitter, 1 + color_jitter]; 0 is off, 0.4 is usual.
        random_erasing: probability that a rectangle of 2 % to 33 % of an image is filled with normal noise after
            normalisation (Zhong et al., 2020); 0 is off.
        mixup: alpha of the Beta(alpha, alpha) from which Mixup draws its weight (Zhang et al., 2018); 0 is off.
        cutmix: alpha of the Beta(alpha, alpha) from which CutMix draws its area (Yun et al., 2019); 0 is off. With both
            Mixup and CutMix on, each batch uses either with probability 1/2.

    Raises:
        ValueError: if a value is out of its range.
    """

    crop_padding: int = 0
    flip: bool = False
    rand_augment: int = 0
    rand_augment_magnitude: int = 9
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "crop_padding": float("inf"),
            "rand_augment": float("inf"),
            "rand_augment_magnitude": 30,
            "color_jitter": 1,
            "random_erasing": 1,
            "mixup": float("inf"),
            "cutmix": float("inf"),
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise ValueError(f"augmentation {name}={value} is out of range: give 0 (off) to {limit}.")


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Pad each image with zeros and crop it back to its size at a random position per image.

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
        generator: source of the B coin flips, on the images' device.

    Returns:
        (B, C, H, W), dtype unchanged.
    """
    coins = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    return torch.where(coins < 0.5, images.flip(-1), images)


def color_jitter(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """Scale brightness, then contrast, then saturation of each image by random factors per image.

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
    Of ten draws the first that fits is used; if none fits, the image is not erased.

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
        augmentation: the options; Mixup and CutMix are not applied here.
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


def mix(
    images: Tensor, labels: Tensor, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with another one by Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899).

    One weight `share` and one permutation are drawn per batch. Mixup: `share * image + (1 - share) * other`. CutMix: a
    rectangle of the area 1 - share is pasted from the other image, then `share` is set to the fraction of the area
    actually kept. Labels: `share * one_hot(label) + (1 - share) * one_hot(other label)`.

    Args:
        images: (B, C, H, W) floats.
        labels: (B,) int64, or (B, K) zeros and ones.
        num_classes: K.
        mixup: alpha of Beta(alpha, alpha); 0 is off.
        cutmix: alpha of Beta(alpha, alpha); 0 is off. With both on, each is used with probability 1/2.
        seed: seed of all draws; `mix_seed(seed, epoch, batch, rank)` makes them repeatable.

    Returns:
        (B, C, H, W) mixed images and (B, K) soft labels, float32, rows summing to 1. With both off, the images
        themselves and one-hot labels.
    """
    if labels.ndim == 2:
        targets = labels.float()
    else:
        targets = torch.zeros(len(labels), num_classes, device=labels.device).scatter_(1, labels[:, None], 1.0)
    if not (mixup or cutmix):
        return images, targets
    draw = random.Random(seed)
    generator = torch.Generator(images.device).manual_seed(seed)
    other = torch.randperm(len(images), generator=generator, device=images.device)
    pastes = cutmix > 0 and (mixup == 0 or draw.random() < 0.5)
    alpha = cutmix if pastes else mixup
    share = draw.betavariate(alpha, alpha)
    if pastes:
        images, share = _paste(images, images[other], share, draw)
    else:
        images = share * images + (1 - share) * images[other]
    return images, share * targets + (1 - share) * targets[other]


def _paste(images: Tensor, others: Tensor, share: float, draw: random.Random) -> tuple[Tensor, float]:
    """Paste a rectangle of `others` into `images`; return the result and the fraction of the area not pasted."""
    height, width = images.shape[-2:]
    side = (1 - share) ** 0.5
    tall, wide = int(height * side), int(width * side)
    row, column = draw.randrange(height), draw.randrange(width)
    top, bottom = max(row - tall // 2, 0), min(row - tall // 2 + tall, height)
    left, right = max(column - wide // 2, 0), min(column - wide // 2 + wide, width)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
