"""Data set and loaders over annotated image files."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffkd.data.detection.annotated_files import Annotations
from diffkd.data.detection.augmentation import BoxAugmentation, augment_boxes
from diffkd.data.seeding import digest_of, mix_seed

Target = dict[str, Tensor]
DetectionBatch = tuple[list[Tensor], list[Target], Tensor]


class DetectionDataset(Dataset[tuple[Tensor, Target, int]]):
    """Return (image, target, index) for the key (epoch, index) of `EpochSampler`.

    The augmentation of an image is a function of (seed, epoch, index), so the number of workers, their timing and a
    resume do not change it. The random state of the process is not changed.

    Args:
        annotations: the boxes; without crowds for training.
        read: function from the index of an image to (3, H, W) uint8.
        augmentation: augmentation of image and boxes; None for evaluation.
        seed: seed of the augmentation.
    """

    def __init__(
        self,
        annotations: Annotations,
        read: Callable[[int], Tensor],
        augmentation: BoxAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.annotations = annotations
        self.read = read
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.annotations)

    @property
    def digest(self) -> str:
        """A digest of images and boxes."""
        return digest_of(self.annotations.image_ids, self.annotations.starts, *self.annotations.boxes)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target, int]:
        """Return the image (3, H, W) float32 in [0, 1], its target and its index.

        The target holds `boxes` (n, 4) float32 left, top, right, bottom in pixels, `labels` (n,) int64 from 1, `area`
        (n,) float32, `iscrowd` (n,) int64 and `image_id` () int64.
        """
        epoch, index = key
        image, boxes = self.read(index), self.annotations.of(index)
        if self.augmentation is not None:
            # torchvision's transforms draw only from the global CPU generator.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
                image, boxes = augment_boxes(image, boxes, self.augmentation)
        # Cloned: a view would transfer the boxes of all images from the worker to the main process.
        target = {name: part.clone() for name, part in boxes._asdict().items()}
        target["image_id"] = self.annotations.image_ids[index].clone()
        return image.to(torch.float32) / 255, target, index

    def example(self) -> list[Tensor]:
        """Return the first and the last image without augmentation, each (3, H, W) float32 in [0, 1]."""
        return [self.read(index).to(torch.float32) / 255 for index in (0, len(self) - 1)]


def collate_detection(samples: Sequence[tuple[Tensor, Target, int]]) -> DetectionBatch:
    """Return the images and targets as lists, since images differ in size, and the indices as (B,) int64."""
    images, targets, indices = zip(*samples, strict=True)
    return list(images), list(targets), torch.tensor(indices)
