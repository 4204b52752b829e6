"""The part that all data modules of segmentation share: two lists of pairs, and the loaders over them."""

import os
from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffkd.data.folder_loader import FolderLoader
from diffkd.data.mask_code import MaskCode
from diffkd.data.pair_dataset import PairDataset
from diffkd.data.pair_scan import Pairs, refuse
from diffkd.data.placement import placement
from diffkd.data.segmentation_augmentation import SegmentationAugmentation
from diffkd.data.segmentation_transform import EvalTransform, TrainTransform, fitted

SCALE_AND_FLIP = SegmentationAugmentation(scale=(0.5, 2.0), flip=True)
Size = tuple[int, int]


class PairLoaders:
    """Make loaders over the pairs of image and mask for training and for evaluation.

    Args:
        train: training pairs.
        val: evaluation pairs.
        code: what the pixels of masks mean.
        batch_size: training images per batch and process.
        augmentation: what is done to training images.
        seed: seed of order and augmentation.
        crop_size: (H, W) of training images; None takes `resize`, or else 512x512.
        resize: (H, W) that all images are brought to first; None leaves them.
        full_size_masks: evaluate resized images against masks of their own size.
        val_batch_size: evaluation images per batch and process at most; None takes `batch_size` where images are
            resized, and 1 otherwise.
        cache: "memory" keeps decoded and resized pairs.
        num_workers: worker processes; None takes none with the cache, and otherwise one per core, at most 8.
        verify: read every pair now.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].

    Raises:
        ValueError: if a value is out of range, no mask has a pixel that counts, or `verify` finds a broken pair.
    """

    def __init__(
        self,
        train: Pairs,
        val: Pairs,
        code: MaskCode,
        *,
        batch_size: int,
        augmentation: SegmentationAugmentation,
        seed: int,
        crop_size: Size | None,
        resize: Size | None,
        full_size_masks: bool,
        val_batch_size: int | None,
        cache: Literal["none", "memory"],
        num_workers: int | None,
        verify: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if cache not in ("none", "memory"):
            raise ValueError(f"cache={cache!r}: give 'none' or 'memory'.")
        if not len(mean) == len(std) == 3 or min(std) <= 0:
            raise ValueError(f"mean={tuple(mean)} and std={tuple(std)}: give three values each, std above 0.")
        self.resize = None if resize is None else _size("resize", resize)
        self.crop_size = self.resize or (512, 512) if crop_size is None else _size("crop_size", crop_size)
        self.batch_size = batch_size
        self.val_batch_size = (batch_size if self.resize else 1) if val_batch_size is None else val_batch_size
        for name, value in (("batch_size", batch_size), ("val_batch_size", self.val_batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} is not a number of images: give 1 or more.")
        if num_workers is None:
            num_workers = 0 if cache == "memory" else min(8, os.cpu_count() or 1)
        self.num_workers = num_workers
        self.seed = seed
        self.mean = (float(mean[0]), float(mean[1]), float(mean[2]))
        self.std = (float(std[0]), float(std[1]), float(std[2]))
        training = TrainTransform(augmentation, self.crop_size, code.ignore_index, self.mean, self.std)
        evaluation = EvalTransform(self.mean, self.std)
        self._evaluation = evaluation
        self._train = PairDataset(train, code, training, seed=seed, resize=self.resize, cache=cache)
        self._val = PairDataset(val, code, evaluation, resize=self.resize, full_size_masks=full_size_masks, cache=cache)
        if verify:
            problems = [message for part in (self._train, self._val) for message in part.problems(os.cpu_count() or 1)]
            refuse(problems, f"{len(problems)} of {len(self._train) + len(self._val)} pairs are broken")
        nothing = f"every pixel of every mask is ignored (id {code.ignore_index}), the first being "
        mend = "Check num_classes, ignore_index, and what maps ids or colours to classes."
        if not self._train.is_labelled():
            raise ValueError(f"nothing to train on: {nothing}{train.masks[0]}. {mend}")
        if not self._val.is_labelled():
            rank_zero_warn(f"nothing to evaluate on: {nothing}{val.masks[0]}. {mend}")

    def train_loader(self, trainer: Trainer | None, start_batch: int = 0) -> FolderLoader:
        """Return shuffled, augmented batches of the training pairs; the first epoch begins at `start_batch`."""
        return self._loader(self._train, trainer, train=True, start_batch=start_batch)

    def val_loader(self, trainer: Trainer | None) -> FolderLoader:
        """Return the evaluation pairs whole, in order, each exactly once over all ranks."""
        return self._loader(self._val, trainer, train=False)

    def example(self) -> Tensor:
        """Return two normalised training images, cut or padded to (2, 3, H, W) of `crop_size`, on the CPU."""
        pairs = [self._evaluation(*self._train.read(index)) for index in (0, len(self._train) - 1)]
        ignored = self._train.code.ignore_index
        return torch.stack([fitted(*pair, self.crop_size, ignored)[0] for pair in pairs])

    def _loader(
        self, dataset: PairDataset, trainer: Trainer | None, *, train: bool, start_batch: int = 0
    ) -> FolderLoader:
        place = placement(trainer)
        return FolderLoader(
            dataset,
            batch_size=self.batch_size if train else self.val_batch_size,
            shuffle=train,
            seed=self.seed,
            num_workers=self.num_workers,
            pin_memory=place.device.type == "cuda",
            rank=place.rank,
            world_size=place.world_size,
            start_batch=start_batch,
            sizes=None if train else dataset.sizes(),
        )


def _size(name: str, size: Sequence[int]) -> Size:
    if len(size) != 2 or not all(int(side) == side and side > 0 for side in size):
        raise ValueError(f"{name}={size} is no size: give (height, width) in pixels, both above 0.")
    return int(size[0]), int(size[1])
