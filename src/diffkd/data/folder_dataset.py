"""One image of a folder at a time: decoded, augmented by a seed of its own, normalised."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from diffkd.data.augmentation import Augmentation
from diffkd.data.decode import read_rgb
from diffkd.data.digest import digest_of
from diffkd.data.folder_scan import FolderSamples
from diffkd.data.seeding import mix_seed


class FolderDataset(Dataset[tuple[Tensor, int, int]]):
    """Give (image, label, index) for the key (epoch, index) that `EpochSampler` yields.

    What is drawn for an image is a function of (seed, epoch, index), so that the number of workers, their timing and a
    resume change nothing. The random state of the process is left as it was.

    Args:
        samples: files and labels.
        transform: PIL image to tensor (C, H, W).
        seed: seed of the augmentation.
    """

    def __init__(self, samples: FolderSamples, transform: v2.Transform, seed: int = 0) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples.paths)

    @property
    def digest(self) -> str:
        """A digest of files and labels."""
        return digest_of(*self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        """Return the image (C, H, W) float32, its label and its index; raise ValueError if the file is broken."""
        epoch, index = key
        image = read_rgb(self.samples.paths[index])
        # Transforms of torchvision draw from the global generator of the CPU, and from no other.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.transform(image), self.samples.labels[index], index


def train_transform(
    augmentation: Augmentation, image_size: int, min_crop_area: float, mean: Sequence[float], std: Sequence[float]
) -> v2.Transform:
    """Build the training transform: random resized crop, then as `Augmentation` says.

    Args:
        augmentation: what to do; `crop_padding` must be 0.
        image_size: side of the square result, in pixels.
        min_crop_area: smallest area of the crop as a fraction of the image; its aspect ratio is in 3/4 to 4/3.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].

    Returns:
        A transform from PIL image to (3, image_size, image_size) float32.
    """
    jitter = augmentation.color_jitter
    steps: list[v2.Transform] = [v2.RandomResizedCrop(image_size, scale=(min_crop_area, 1.0))]
    if not (augmentation.rand_augment or jitter):
        # Cut as a tensor: in about half the time, at most one level of 255 away. Colours are changed in PIL images.
        steps.insert(0, v2.PILToTensor())
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augmentation.rand_augment:
        steps.append(v2.RandAugment(augmentation.rand_augment, augmentation.rand_augment_magnitude))
    if jitter:
        steps.append(v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter))
    steps.append(_normalised(mean, std))
    if augmentation.random_erasing:
        steps.append(v2.RandomErasing(augmentation.random_erasing, value="random"))
    return v2.Compose(steps)


def eval_transform(image_size: int, crop_ratio: float, mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """Build the evaluation transform: the shorter side to image_size / crop_ratio, then the centre.

    Args:
        image_size: side of the square result, in pixels.
        crop_ratio: fraction of the resized image's shorter side that is kept.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].

    Returns:
        A transform from PIL image to (3, image_size, image_size) float32.
    """
    resize, crop = v2.Resize(round(image_size / crop_ratio)), v2.CenterCrop(image_size)
    return v2.Compose([v2.Lambda(_shortened), resize, crop, _normalised(mean, std)])


def _shortened(image: Image.Image) -> Image.Image:
    """Return the middle of a strip: scaled to the shorter side as a whole, one of few rows would fill the memory."""
    longest = 16 * min(image.size)
    if max(image.size) <= longest:
        return image
    middle: Image.Image = v2.functional.center_crop(image, [min(image.height, longest), min(image.width, longest)])
    return middle


def _normalised(mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    # The three channels come interleaved; apart, all that follows, batching too, is faster.
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.Lambda(torch.Tensor.contiguous),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std), inplace=True),
        ]
    )
