"""Images in class folders, the layout of ImageNet."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from diffkd.data.classification.augmentation import Augmentation
from diffkd.data.folders import (
    FolderSamples,
    FolderScan,
    allow_outside_links,
    class_folders,
    format_names,
    scan_folder,
    scan_test,
)
from diffkd.data.image_data import ImageData, evaluated_classes, train_or_val
from diffkd.data.images import (
    BAD_IMAGE_HINT,
    WHITE,
    OnBadImage,
    Verified,
    check_every_class,
    check_on_bad_image,
    check_readable,
    read_rgb,
    verify_images,
)
from diffkd.data.images import white_level as white_level_of
from diffkd.data.loaders import SplitLoaders, UnlabelledLoaders
from diffkd.data.seeding import digest_of, mix_seed, split_by_class
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD, check_statistics


class FolderDataset(Dataset[tuple[Tensor, int, int]]):
    """Return (image, label, index) for the key (epoch, index) of `EpochSampler`.

    The augmentation of an image is a function of (seed, epoch, index), so the number of workers, their timing and a
    resume do not change it. The random state of the process is not changed.

    Args:
        samples: files and labels.
        transform: PIL image to tensor (C, H, W).
        seed: seed of the augmentation.
        white: the value of 16-bit images that becomes 255.
    """

    def __init__(self, samples: FolderSamples, transform: v2.Transform, seed: int = 0, white: int = WHITE) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.white = white

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
        image = read_rgb(self.samples.paths[index], self.white)
        # torchvision's transforms draw only from the global CPU generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.transform(image), self.samples.labels[index], index


def train_transform(
    augmentation: Augmentation, image_size: int, min_crop_area: float, mean: Sequence[float], std: Sequence[float]
) -> v2.Transform:
    """Build the training transform: random resized crop, then the steps of `Augmentation`.

    Args:
        augmentation: the options; `crop_padding` must be 0.
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
        # Crop as a tensor: half the time of PIL, at most 1/255 apart. Colour operations work on PIL images.
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
    """Build the evaluation transform: resize the shorter side to image_size / crop_ratio, then crop the centre.

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
    """Crop the middle of a very elongated image: resizing all of it by its shorter side could fill the memory."""
    longest = 16 * min(image.size)
    if max(image.size) <= longest:
        return image
    middle: Image.Image = v2.functional.center_crop(image, [min(image.height, longest), min(image.width, longest)])
    return middle


def _normalised(mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    # PIL's channels are interleaved; contiguous channels make everything after this, also batching, faster.
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.Lambda(torch.Tensor.contiguous),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std), inplace=True),
        ]
    )


FLIP = Augmentation(flip=True)


class ImageFolder(ImageData):
    """Serve images from `root/train/<class>/` and `root/val/<class>/`, decoded by worker processes.

    The folder `val` may also be named `valid`, `validation` or `test`. The folders are listed and checked when the
    module is created; `root/test/<class>/` beside `val` is read by `diffkd test` alone. Training images get a random
    resized crop; evaluation images are resized and centre-cropped. All images are converted to upright 8-bit RGB
    (`diffkd.data.images`).

    Args:
        root: the folder.
        batch_size: images per batch and process.
        augmentation: augmentation of training images besides the random resized crop; `crop_padding` must be 0.
        seed: seed of order and augmentation.
        image_size: side of the square input images, in pixels.
        min_crop_area: smallest area of the random resized crop, as a fraction of the image.
        crop_ratio: fraction of the shorter side that the centre crop keeps in evaluation.
        num_workers: worker processes; None uses one per core, at most 8.
        on_bad_image: "error" refuses empty and unreadable files before training and stops at a file that cannot be
            decoded, with its name; "skip" decodes every file before training and leaves the broken ones out, with a
            warning that counts and names them.
        verify: with "error" too, decode every file before training, so that a broken file stops the run then and not in
            mid-epoch.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].
        follow_links: allow symbolic links that lead out of the folder, as in caches and on shared disks. Set it only if
            you trust the links.
        val_share: share of the training images to hold out for evaluation instead of `val`, drawn by `seed` with the
            same share of each class; None uses `val`. With a share, a root without `train` may hold the class folders
            itself, `root/<class>/`: two or more, with none named like `val`, `test`, `images` or `labels` among them.
        white_level: the value of 16-bit images that is mapped to white, 255; 4095 for 12 bits. None uses 65535, and
            warns if all images would be nearly black.
        labels: False: distil representations without the labels, which then serve to measure them.

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
        follow_links: bool = False,
        val_share: float | None = None,
        white_level: int | None = None,
        labels: bool = True,
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
        with allow_outside_links(follow_links):
            scan = partial(_scan, root, val_share)
            only_val = partial(scan_folder, root, train=False, known=evaluated_classes(()))
            (classes, train, val), trains = train_or_val(scan, only_val)
        if val_share is not None and trains:
            train, val = (train.select(part) for part in split_by_class(train.labels, val_share, seed))
        white = white_level_of(white_level, train.paths)
        num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        skipped: list[str] = []
        if verify or on_bad_image == "skip":
            check = partial(_verified, on_bad_image=on_bad_image, threads=num_workers)
            val, broken = check(val, split="val")
            train, more = check(train, split="train") if trains else (val, [])
            skipped = [*more, *broken]
        else:
            check_readable(train)
            check_readable(val)
        check_every_class(train if trains else None, val, classes)
        evaluation = eval_transform(image_size, crop_ratio, mean, std)
        training = train_transform(augmentation, image_size, min_crop_area, mean, std)
        loaders: SplitLoaders = (SplitLoaders if labels else UnlabelledLoaders)(
            FolderDataset(train, training, seed, white),
            FolderDataset(val, evaluation, white=white),
            partial(_example, FolderDataset(train, evaluation, white=white)),
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        if isinstance(loaders, UnlabelledLoaders):
            loaders = replace(loaders, bank=FolderDataset(train, evaluation, white=white))
        super().__init__(loaders, classes, image_size=(image_size, image_size), mean=mean, std=std, labels=labels)
        # The argument is one side; the attribute holds both.
        self.save_hyperparameters("image_size", logger=False)
        self.root = root
        self.batch_size, self.augmentation, self.seed, self.labels = batch_size, augmentation, seed, labels
        self.min_crop_area, self.crop_ratio = min_crop_area, crop_ratio
        self.num_workers = num_workers
        self.on_bad_image, self.verify = on_bad_image, verify
        self.follow_links, self.val_share, self.white_level = follow_links, val_share, white_level
        self.skipped = skipped

    def read_test(self) -> FolderDataset | None:
        """Return the images of `root/test/<class>/`, checked with the same options as the evaluation images.

        Returns:
            The images, or None if there is no such folder, or none in it has the name of a class.

        Raises:
            ValueError: as when the module is created.
        """
        with allow_outside_links(self.follow_links):
            samples = scan_test(self.root, self.classes)
        if samples is None or not isinstance(self._loaders, SplitLoaders):
            return None
        if self.verify or self.on_bad_image == "skip":
            samples, broken = _verified(samples, split="test", on_bad_image=self.on_bad_image, threads=self.num_workers)
            self.skipped.extend(broken)
            if not samples.paths:
                raise ValueError("test: no readable image is left; add some.")
        else:
            check_readable(samples)
        evaluated: Any = self._loaders.val
        return FolderDataset(samples, evaluated.transform, white=evaluated.white)


def _scan(root: str | Path, val_share: float | None) -> FolderScan:
    """List the training images, of `train` or of class folders in the root, and without `val_share` those of `val`."""
    found = () if (Path(root) / "train").is_dir() else class_folders(root)
    if found and val_share is None:
        raise FileNotFoundError(
            f"{Path(root) / 'train'}: no such folder, but {root} holds folders such as {format_names(found)}; if these "
            "are the classes, set val_share=0.2 to hold a fifth of their images back for evaluation, or move them into "
            "train/<class> and val/<class>."
        )
    # A student that is evaluated may meet class folders of some of its classes, which are evaluation images.
    known = evaluated_classes(())
    return scan_folder(root, val=val_share is None, in_root=bool(found) and (not known or set(known) == set(found)))


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
    """Return the images that can be decoded; for others, warn or raise, depending on `on_bad_image`."""
    verified = verify_images(samples, threads)
    problems = verified.problems
    counted = f"{split}: {len(problems)} of {len(samples.paths)} images are"
    if problems and on_bad_image == "error":
        raise ValueError(f"{counted} broken; the first: {problems[0]}")
    if problems:
        listed = "\n  ".join(problem.removesuffix(BAD_IMAGE_HINT) for problem in problems[:10])
        rank_zero_warn(f"{counted} left out:\n  {listed}")
    return verified
