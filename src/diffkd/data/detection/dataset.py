"""Data set and loaders over annotated image files."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from diffkd.data.detection.annotated_files import AnnotatedFiles, Annotations
from diffkd.data.detection.augmentation import BoxAugmentation, augment_boxes
from diffkd.data.folders import FolderSamples, absent_classes, quoted
from diffkd.data.images import MEND, OnBadImage, check_on_bad_image, check_readable, upright_size
from diffkd.data.loaders import SplitLoaders
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


class DetectionFiles:
    """Check the splits of a detection data set and make loaders over them.

    Args:
        train: images to train on; their crowd boxes are left out.
        val: images to evaluate on; crowd boxes stay, flagged.
        test: images to test on; None takes `val`.
        batch_size: images per batch and process.
        augmentation: what is done to training images and their boxes.
        seed: seed of order and augmentation.
        keep_empty: whether to train on images without boxes, too.
        num_workers: worker processes; None takes one per core, at most 8.
        on_bad_image: "error" or "skip", see `ImageFolder`.
        verify: decode every file before training also for "error".

    Attributes:
        splits: the loaders.
        image_size: (H, W) of the first image.
        skipped: one message per image left out because it is broken.
        dropped: one message per box left out because it has no extent inside its image.

    Raises:
        FileNotFoundError: if an image file is missing.
        ValueError: if no image or no box is left to train on, or a file is broken.
    """

    def __init__(
        self,
        train: AnnotatedFiles,
        val: AnnotatedFiles,
        test: AnnotatedFiles | None,
        *,
        batch_size: int,
        augmentation: BoxAugmentation,
        seed: int,
        keep_empty: bool,
        num_workers: int | None,
        on_bad_image: OnBadImage,
        verify: bool,
    ) -> None:
        check_on_bad_image(on_bad_image)
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.skipped: list[str] = []
        self.dropped: list[str] = []
        self._decodes = verify or on_bad_image == "skip"
        train = _to_train(self._checked(train, on_bad_image), keep_empty)
        val = _to_measure(self._checked(val, on_bad_image))
        height, width = train.sizes[0].tolist()
        self.image_size: tuple[int, int] = (height, width)
        training = DetectionDataset(train.annotations, train.read, augmentation, seed)
        if test is not None:
            test = _to_measure(self._checked(test, on_bad_image))
        self.splits = SplitLoaders(
            training,
            DetectionDataset(val.annotations, val.read),
            training.example,
            batch_size=batch_size,
            seed=seed,
            test=None if test is None else DetectionDataset(test.annotations, test.read),
            num_workers=self.num_workers,
            drop_last=False,
            collate=collate_detection,
        )

    def _checked(self, files: AnnotatedFiles, on_bad_image: OnBadImage) -> AnnotatedFiles:
        """Return the images that can be used; collect and warn of what is left out."""
        if files.dropped:
            rank_zero_warn(f"{len(files.dropped)} box(es) are left out; the first: {files.dropped[0]}")
            self.dropped += files.dropped
        if files.cut:
            rank_zero_warn(
                f"{files.cut} box(es) are cut at the border of their image: if they are many, they may be in another "
                f"format; the first: {files.first_cut}"
            )
        corners = files.annotations.boxes.boxes
        if len(corners) and corners.max() <= 1 and files.sizes.max() > 2:
            raise ValueError(
                f"{files.source}: all boxes lie in the first pixel of their image; write pixels, not shares."
            )
        repeated = [path for path, count in Counter(files.paths).items() if count > 1]
        if repeated:
            rank_zero_warn(
                f"{files.source}: {len(repeated)} image files are there more than once, first {repeated[0]}: "
                "where each time has some of its boxes only, the others pass for background: put them together."
            )
        if not self._decodes:
            _check_present(files)
            return files
        with ThreadPoolExecutor(max(self.num_workers, 1)) as pool:
            problems = list(pool.map(partial(_problem, files), range(len(files.paths)), chunksize=64))
        found = [problem for problem in problems if problem is not None]
        if not found:
            return files
        counted = f"{files.source}: {len(found)} of {len(problems)} images are"
        if on_bad_image == "error":
            raise ValueError(f"{counted} broken; the first: {found[0]}")
        good = [index for index, problem in enumerate(problems) if problem is None]
        if not good:
            raise ValueError(f"{counted} broken, and none is left; the first: {found[0]}")
        listed = "\n  ".join(problem.removesuffix(MEND) for problem in found[:10])
        rank_zero_warn(f"{counted} left out:\n  {listed}")
        self.skipped += found
        return files.select(good)


def _to_train(files: AnnotatedFiles, keep_empty: bool) -> AnnotatedFiles:
    """Return the images to train on, without crowd boxes; warn of absent classes, raise ValueError if none is there."""
    stated = len(files.annotations.boxes.labels)
    files = replace(files, annotations=files.annotations.without_crowds())
    full = files.annotations.starts.diff().nonzero()[:, 0].tolist()
    if not full:
        why = f"all {stated} boxes are marked as crowds or difficult, which are left out" if stated else "there is none"
        raise ValueError(f"{files.source}: no image has a box to train on ({why}); add boxes of single objects.")
    absent = absent_classes((files.annotations.boxes.labels - 1).tolist(), files.classes)
    if absent:
        rank_zero_warn(
            f"{files.source}: no box of class(es) {quoted(absent)} to train on, which cannot be learned; add some, or "
            "remove the class if it is none."
        )
    return files if keep_empty else files.select(full)


def _to_measure(files: AnnotatedFiles) -> AnnotatedFiles:
    """Return the images to evaluate on; warn if they have no box that counts."""
    if not bool((files.annotations.boxes.iscrowd == 0).any()):
        rank_zero_warn(
            f"{files.source}: no image has a box that counts, so that the average precision will be 0 whatever is "
            "found; evaluate on annotated images."
        )
    return files


def _check_present(files: AnnotatedFiles) -> None:
    """Raise if a file is missing, empty, unreadable or not of the stated size; quick, for it reads heads alone."""
    missing = [path for path in files.paths if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{files.source}: image {missing[0]} is missing ({len(missing)} of {len(files.paths)} are); check the "
            'folder of the images, or set on_bad_image="skip" to leave such images out.'
        )
    check_readable(FolderSamples(list(files.paths), []))
    for index, (path, size) in enumerate(zip(files.paths, files.sizes.tolist(), strict=True)):
        if upright_size(path) != tuple(size):
            files.read(index)  # says so, unless what turns the picture stands behind its pixels


def _problem(files: AnnotatedFiles, index: int) -> str | None:
    try:
        files.read(index)
    except ValueError as error:
        return str(error)
    return None
