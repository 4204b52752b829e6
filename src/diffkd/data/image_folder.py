"""Images in folders, one per class: the usual form of ImageNet and of one's own data."""

import os
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffkd.data.augmentation import Augmentation
from diffkd.data.bad_images import OnBadImage, check_on_bad_image
from diffkd.data.decode import MEND
from diffkd.data.folder_dataset import FolderDataset, eval_transform, train_transform
from diffkd.data.folder_scan import FolderSamples, scan_folder
from diffkd.data.image_data import ImageData
from diffkd.data.split_loaders import SplitLoaders
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD, check_statistics
from diffkd.data.verification import Verified, check_every_class, check_readable, verify_images

FLIP = Augmentation(flip=True)


class ImageFolder(ImageData):
    """Serve images from `root/train/<class>/` and `root/val/<class>/`, decoded by worker processes.

    Instead of `val` the folder may be called `valid`, `validation` or `test`. The folders are listed and checked when
    the module is made. Training images are cut by a random resized crop; evaluation images are resized and cut in the
    middle. Every kind of image becomes upright 8-bit RGB (`diffkd.data.decode`).

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
        ValueError: if a class has no training image, evaluation images are of other classes, a link leaves the root,
            or a value is out of range.
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
        on_bad_image: OnBadImage = "error",
        verify: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
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
        check_statistics(mean, std)
        check_on_bad_image(on_bad_image)
        classes, train, val = scan_folder(root)
        num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        skipped: list[str] = []
        if verify or on_bad_image == "skip":
            check = partial(_verified, on_bad_image=on_bad_image, threads=num_workers)
            (train, broken), (val, more) = check(train, split="train"), check(val, split="val")
            skipped = [*broken, *more]
        else:
            check_readable(train)
            check_readable(val)
        check_every_class(train, val, classes)
        evaluation = eval_transform(image_size, crop_ratio, mean, std)
        training = train_transform(augmentation, image_size, min_crop_area, mean, std)
        loaders = SplitLoaders(
            FolderDataset(train, training, seed),
            FolderDataset(val, evaluation),
            partial(_example, FolderDataset(train, evaluation)),
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        super().__init__(loaders, classes, image_size=(image_size, image_size), mean=mean, std=std)
        # As an argument it is one side, as an attribute both.
        self.save_hyperparameters("image_size", logger=False)
        self.root = root
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.min_crop_area, self.crop_ratio = min_crop_area, crop_ratio
        self.num_workers = num_workers
        self.on_bad_image, self.verify = on_bad_image, verify
        self.skipped = skipped


def _example(data: FolderDataset) -> Tensor:
    """Return the first and the last image, (2, 3, H, W)."""
    return torch.stack([data[0, index][0] for index in (0, len(data) - 1)])


def _verified(
    samples: FolderSamples,
    *,
    split: str,
    on_bad_image: OnBadImage,
    threads: int,
) -> Verified:
    """Return the images that can be decoded, and warn of the others or refuse them."""
    verified = verify_images(samples, threads)
    problems = verified.problems
    counted = f"{split}: {len(problems)} of {len(samples.paths)} images are"
    if problems and on_bad_image == "error":
        raise ValueError(f"{counted} broken; the first: {problems[0]}")
    if problems:
        listed = "\n  ".join(problem.removesuffix(MEND) for problem in problems[:10])
        rank_zero_warn(f"{counted} left out:\n  {listed}")
    return verified
