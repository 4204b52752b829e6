"""Images in folders, one per class: the usual form of ImageNet and of one's own data."""

import os
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffkd.data.augmentation import Augmentation
from diffkd.data.decode import MEND
from diffkd.data.folder_dataset import FolderDataset, eval_transform, train_transform
from diffkd.data.folder_loader import FolderLoader
from diffkd.data.folder_scan import FolderSamples, scan_folder
from diffkd.data.placement import placement
from diffkd.data.verification import check_every_class, check_readable, verify_images

# The channels of ImageNet's training images, in units of [0, 1]; pretrained models expect these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FLIP = Augmentation(flip=True)


class ImageFolder(LightningDataModule):
    """Serve images from `root/train/<class>/` and `root/val/<class>/` (or `root/test/`), decoded by worker processes.

    The folders are listed and checked when the module is made. Training images are cut by a random resized crop;
    evaluation images are resized and cut in the middle. Every kind of image becomes upright 8-bit RGB
    (`diffkd.data.decode`).

    Args:
        root: the folder.
        batch_size: images per batch and process.
        augmentation: what is done to training images besides the random resized crop; `crop_padding` must be 0.
        seed: seed of order and augmentation.
        image_size: side of the square images the models get, in pixels.
        min_crop_area: smallest area of the random resized crop, as a fraction of the image.
        crop_ratio: fraction of the shorter side that the centre crop of evaluation keeps.
        num_workers: worker processes; None takes one per core, at most 8.
        on_bad_image: "error" refuses empty and unreadable files before training and stops at a file that cannot be
            decoded, with its name; "skip" decodes every file before training and leaves the broken ones out, with a
            warning that counts and names them.
        verify: decode every file before training also for "error", so that it stops then and not in mid-epoch.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].

    Attributes:
        skipped: one message per image left out.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if a class is empty, the classes of the splits differ, a link leaves the root, or a value is out of
            range.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 256,
        augmentation: Augmentation = FLIP,
        seed: int = 0,
        image_size: int = 224,
        min_crop_area: float = 0.08,
        crop_ratio: float = 0.875,
        num_workers: int | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        verify: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if augmentation.crop_padding:
            raise ValueError(
                f"crop_padding={augmentation.crop_padding} is for images in memory, folders are cut by min_crop_area; "
                "set crop_padding to 0."
            )
        if not (0 < min_crop_area <= 1 and 0 < crop_ratio <= 1 and image_size > 0):
            raise ValueError(
                f"min_crop_area={min_crop_area} and crop_ratio={crop_ratio} must be in (0, 1], "
                f"image_size={image_size} above 0."
            )
        self.root = root
        self.batch_size = batch_size
        self.seed = seed
        self.min_crop_area, self.crop_ratio = min_crop_area, crop_ratio
        self.on_bad_image, self.verify = on_bad_image, verify
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.skipped: list[str] = []
        self.classes, train, val = scan_folder(root)
        if verify or on_bad_image == "skip":
            train = self._verified(train, "train", on_bad_image)
            val = self._verified(val, "val", on_bad_image)
        else:
            check_readable(train)
            check_readable(val)
        evaluation = eval_transform(image_size, crop_ratio, mean, std)
        training = train_transform(augmentation, image_size, min_crop_area, mean, std)
        self._train = FolderDataset(train, training, seed)
        self._val = FolderDataset(val, evaluation)
        self._plain_train = FolderDataset(train, evaluation)
        self.num_classes = len(self.classes)
        self.in_channels = 3
        self.image_size = (image_size, image_size)
        self.mean, self.std = tuple(mean), tuple(std)
        self.augmentation = augmentation
        self.start_batch = 0

    def train_dataloader(self) -> FolderLoader:
        """Return shuffled, augmented training batches; the first epoch begins at `start_batch`."""
        return self._loader(self._train, train=True)

    def val_dataloader(self) -> FolderLoader:
        """Return the batches of the evaluation images, each image exactly once."""
        return self._loader(self._val, train=False)

    def test_dataloader(self) -> FolderLoader:
        """Return the same as `val_dataloader`."""
        return self.val_dataloader()

    def example(self) -> Tensor:
        """Return two normalised training images, (2, 3, image_size, image_size) float32 on the CPU."""
        return torch.stack([self._plain_train[0, index][0] for index in (0, len(self._plain_train) - 1)])

    def _loader(self, dataset: FolderDataset, *, train: bool) -> FolderLoader:
        place = placement(self.trainer)
        return FolderLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=train,
            seed=self.seed,
            num_workers=self.num_workers,
            pin_memory=place.device.type == "cuda",
            rank=place.rank,
            world_size=place.world_size,
            start_batch=self.start_batch if train else 0,
        )

    def _verified(self, samples: FolderSamples, split: str, on_bad_image: Literal["error", "skip"]) -> FolderSamples:
        good, problems = verify_images(samples, self.num_workers)
        if problems and on_bad_image == "error":
            raise ValueError(
                f"{split}: {len(problems)} of {len(samples.paths)} images are broken; the first: {problems[0]}"
            )
        check_every_class(good, self.classes, split)
        if problems:
            listed = "\n  ".join(problem.removesuffix(MEND) for problem in problems[:10])
            rank_zero_warn(f"{split}: {len(problems)} of {len(samples.paths)} images are left out:\n  {listed}")
        self.skipped += problems
        return good
