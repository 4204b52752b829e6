"""Mean and standard deviation of the channels of a data set."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The channels of ImageNet's training images, in units of [0, 1]; pretrained models expect these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_statistics(mean: Sequence[float], std: Sequence[float], channels: int = 3) -> None:
    """Raise ValueError unless there is one mean and one standard deviation per channel, in units of [0, 1]."""
    counted = len(mean) == len(std) == channels
    if not (counted and all(0 <= value <= 1 for value in mean) and all(value > 0 for value in std)):
        raise ValueError(
            f"mean={tuple(mean)} and std={tuple(std)}: give {channels} value(s) each, mean from 0 to 1, std above 0; "
            "those of pixels from 0 to 255 are to be divided by 255."
        )


def pixel_unit(images: Tensor) -> float | None:
    """Return the value that stands for white, up to rounding and overshoots of resizing; None if nothing says.

    Args:
        images: uint8, or finite floats.

    Returns:
        1 for uint8, whose statistics are in units of [0, 1], and for floats in [0, 1]; 255 for floats in [0, 255] some
        of which are above 16; None for other floats.
    """
    if images.dtype == torch.uint8:
        return 1.0
    low, high = (float(value) for value in images.aminmax())
    for unit, least in ((1.0, -math.inf), (255.0, 16.0)):
        if -0.05 * unit <= low and least < high <= 1.05 * unit:
            return unit
    return None


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and the (population) standard deviation of each channel over all pixels of all images.

    Args:
        images: (N, C, H, W) uint8, or finite floats.

    Returns:
        C means and C standard deviations: in units of [0, 1] for uint8 images (exact, from histograms), in the images'
        own unit for floats (in float64). A constant channel gets the standard deviation 1, so that it can be divided
        by.
    """
    means, deviations = [], []
    for channel in images.unbind(dim=1):
        if images.dtype == torch.uint8:
            # In parts, since bincount temporarily needs eight times the memory of its input.
            parts = [torch.bincount(part.flatten(), minlength=256) for part in torch.split(channel, 1000)]
            counts = torch.stack(parts).sum(dim=0).to(torch.float64)
            values = torch.arange(256, dtype=torch.float64, device=images.device) / 255
            mean = (counts * values).sum() / counts.sum()
            variance = (counts * (values - mean) ** 2).sum() / counts.sum()
        else:
            variance, mean = torch.var_mean(channel.to(torch.float64), correction=0)
        means.append(mean.item())
        deviations.append(variance.sqrt().item() or 1.0)
    return tuple(means), tuple(deviations)
