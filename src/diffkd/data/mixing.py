"""Mixup and CutMix: two images of a batch become one, and the label becomes soft."""

import random

import torch
from torch import Tensor


def mix(
    images: Tensor, labels: Tensor, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with another one by Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899).

    One weight `share` and one permutation are drawn per batch. Mixup: `share * image + (1 - share) * other`. CutMix: a
    rectangle of the area 1 - share is pasted from the other image, then `share` is set to the area really kept. Labels:
    `share * one_hot(label) + (1 - share) * one_hot(other label)`.

    Args:
        images: (B, C, H, W) floats.
        labels: (B,) int64.
        num_classes: K.
        mixup: alpha of Beta(alpha, alpha); 0 is off.
        cutmix: alpha of Beta(alpha, alpha); 0 is off. With both on, one of them is taken with probability 1/2.
        seed: all that is drawn is a function of it; `mix_seed(seed, epoch, batch, rank)` makes it repeatable.

    Returns:
        (B, C, H, W) mixed images and (B, K) soft labels, float32, rows summing to 1. With both off, the images
        themselves and one-hot labels.
    """
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
    """Return images with a rectangle of the others, and the share of the area that is still theirs."""
    height, width = images.shape[-2:]
    side = (1 - share) ** 0.5
    tall, wide = int(height * side), int(width * side)
    row, column = draw.randrange(height), draw.randrange(width)
    top, bottom = max(row - tall // 2, 0), min(row - tall // 2 + tall, height)
    left, right = max(column - wide // 2, 0), min(column - wide // 2 + wide, width)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
