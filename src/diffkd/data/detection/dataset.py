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
    """Give (image, target, index) for the key (epoch, index) that `EpochSampler` yields.

    What is drawn for an image is a function of (seed, epoch, index), so that the number of workers, their timing and a
    resume change nothing. The random state of the process is left as it was.

    Args:
        annotations: the boxes; without crowds for training.
        read: the index of an image to (3, H, W) uint8.
        augmentation: what is done to the image and its boxes; None for evaluation.
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
            # Transforms of torchvision draw from the global generator of the CPU, and from no other.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
                image, boxes = augment_boxes(image, boxes, self.augmentation)
        # Of its own memory: a view would send the boxes of all images along from worker to trainer.
        target = {name: part.clone() for name, part in boxes._asdict().items()}
        target["image_id"] = self.annotations.image_ids[index].clone()
        return image.to(torch.float32) / 255, target, index

    def example(self) -> list[Tensor]:
        """Return the first and the last image as they are, each (3, H, W) float32 in [0, 1]."""
        return [self.read(index).to(torch.float32) / 255 for index in (0, len(self) - 1)]


def collate_detection(samples: Sequence[tuple[Tensor, Target, int]]) -> DetectionBatch:
    """Return the images and targets as lists, since images differ in size, and the indices as (B,) int64."""
    images, targets, indices = zip(*samples, strict=True)
    return list(images), list(targets), torch.tensor(indices)
