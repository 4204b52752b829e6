"""Base of the segmentation data modules: shared arguments, and loaders over training and evaluation pairs."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffkd.data.folders import allow_outside_links, format_names
from diffkd.data.image_data import ImageData, train_or_val, val_or_hint
from diffkd.data.images import OnBadImage, check_on_bad_image
from diffkd.data.images import white_level as white_level_of
from diffkd.data.loaders import SplitLoaders
from diffkd.data.seeding import split_by_class
from diffkd.data.segmentation.dataset import PairDataset
from diffkd.data.segmentation.masks import MaskCode
from diffkd.data.segmentation.pairs import Pairs, refuse
from diffkd.data.segmentation.transform import EvalTransform, SegmentationAugmentation, TrainTransform, fitted
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD, check_statistics

SCALE_AND_FLIP = SegmentationAugmentation(scale=(0.5, 2.0), flip=True)
Size = tuple[int, int]
Split = Literal["train", "val"]
# Lists the pairs of a split; the second argument is whether pairs that cannot be used are kept for a later check.
ReadPairs = Callable[[Split, bool], Pairs]


class SegmentationData(ImageData):
    """Serve pairs of image and mask; training images are augmented and cropped, evaluation images are not.

    Batches are images (B, 3, H, W) float32 normalised, masks (B, H, W) int64 of class ids in [0, K) or `ignore_index`,
    and indices (B,) int64. An evaluation batch contains only images of one size.

    Args:
        read: function that lists the pairs of a split.
        code: mapping from mask pixels to class ids.
        names: names of the K classes.
        batch_size: training images per batch and process.
        augmentation: augmentation of training images besides the random crop.
        seed: seed of order and augmentation.
        crop_size: (H, W) of training images in pixels; None uses `resize`, or else (512, 512).
        resize: (H, W) to which all images are resized first, also in evaluation; None does not resize.
        full_size_masks: in evaluation, keep masks at their original size while images are resized.
        val_batch_size: largest number of evaluation images per batch and process; None uses `batch_size` if images are
            resized, otherwise 1.
        cache: "memory" caches the decoded and resized pairs in the memory of each process, so that small data sets are
            decoded once.
        num_workers: worker processes; None: 0 with the cache, otherwise one per core, at most 8.
        verify: read every image and mask before training, and list those that cannot be used, instead of stopping at
            the first in mid-epoch.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].
        follow_links: allow symbolic links that lead out of the folder, as in caches and on shared disks. Set it only if
            you trust the links; names in annotations stay inside in any case.
        val_share: share of the training images that is held back for evaluation, drawn by `seed`, instead of the
            evaluation images; None uses the evaluation images.
        white_level: the value of 16-bit images that is mapped to white, 255; 4095 for 12 bits. None uses 65535, and
            warns if all images would be nearly black.
        on_bad_image: "error" raises for pairs that cannot be used; "skip" reads every pair before training and leaves
            out unusable ones, with a warning that counts and names them.

    Attributes:
        skipped: one message per pair left out.

    Raises:
        FileNotFoundError: if a folder or list is missing.
        ValueError: if a pair of files cannot be used, as in `MaskFolder`, a value is out of range, the training masks
            have fewer than two classes, or `verify` finds a broken pair.
    """

    task = "segmentation"
    ignore_index = 255

    def __init__(
        self,
        read: ReadPairs,
        code: MaskCode,
        names: Sequence[str],
        /,
        *,
        batch_size: int = 8,
        augmentation: SegmentationAugmentation = SCALE_AND_FLIP,
        seed: int = 0,
        crop_size: Size | None = None,
        resize: Size | None = None,
        full_size_masks: bool = False,
        val_batch_size: int | None = None,
        cache: Literal["none", "memory"] = "none",
        num_workers: int | None = None,
        verify: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        follow_links: bool = False,
        val_share: float | None = None,
        white_level: int | None = None,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        check_on_bad_image(on_bad_image)
        skip = on_bad_image == "skip"
        with allow_outside_links(follow_links):
            train_pairs, trains = train_or_val(partial(read, "train", skip), partial(read, "val", skip))
            if not trains:
                val_pairs = train_pairs
            elif val_share is None:
                val_pairs = val_or_hint(partial(read, "val", skip))
            else:
                kept, held = split_by_class([0] * len(train_pairs.images), val_share, seed)
                train_pairs, val_pairs = train_pairs.select(kept), train_pairs.select(held)
        if cache not in ("none", "memory"):
            raise ValueError(f"cache={cache!r}: give 'none' or 'memory'.")
        check_statistics(mean, std)
        resize = None if resize is None else _size("resize", resize)
        crop_size = resize or (512, 512) if crop_size is None else _size("crop_size", crop_size)
        val_batch_size = (batch_size if resize else 1) if val_batch_size is None else val_batch_size
        for name, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} is not a number of images: give 1 or more.")
        if num_workers is None:
            num_workers = 0 if cache == "memory" else min(8, os.cpu_count() or 1)
        crop, whole = TrainTransform(augmentation, crop_size, code.ignore_index, mean, std), EvalTransform(mean, std)
        white = white_level_of(white_level, train_pairs.images)
        skipped: list[str] = []
        all_learned: set[int] | None = None  # known if every mask was read
        if skip:
            if trains:
                train_pairs, all_learned = _without_broken(PairDataset(train_pairs, code, whole), "training", skipped)
            val_pairs, _ = _without_broken(PairDataset(val_pairs, code, whole), "evaluation", skipped)
            train_pairs = train_pairs if trains else val_pairs
        training = PairDataset(train_pairs, code, crop, seed=seed, resize=resize, cache=cache, white=white)
        evaluation = PairDataset(
            val_pairs, code, whole, resize=resize, full_size_masks=full_size_masks, cache=cache, white=white
        )
        if verify and not skip:
            all_learned = _verified(training, evaluation)
        if trains:
            _check_ids(training, evaluation, all_learned)
        loaders = SplitLoaders(
            training,
            evaluation,
            partial(_example, training, whole, crop_size),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            seed=seed,
            num_workers=num_workers,
            sizes=evaluation.sizes(),
        )
        super().__init__(loaders, names, image_size=crop_size, mean=mean, std=std)
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.augmentation, self.seed = augmentation, seed
        self.resize, self.crop_size = resize, crop_size
        self.full_size_masks, self.cache, self.verify = full_size_masks, cache, verify
        self.num_workers = num_workers
        self.ignore_index = code.ignore_index
        self.follow_links, self.val_share, self.white_level = follow_links, val_share, white_level
        self.on_bad_image, self.skipped = on_bad_image, skipped


def _without_broken(data: PairDataset, split: str, skipped: list[str]) -> tuple[Pairs, set[int]]:
    """Return the readable pairs and their class ids; collect messages about the others, and warn."""
    broken, ids = data.scan(os.cpu_count() or 1)
    problems = list(broken.values())
    counted = f"{len(broken)} of {len(data)} {split} pairs are"
    if len(broken) == len(data):
        refuse(problems, f"{counted} broken, so that none is left")
    if broken:
        listed = "\n  ".join(problems[:10])
        rank_zero_warn(f"{counted} left out:\n  {listed}")
    skipped += problems
    return data.pairs.select([index for index in range(len(data)) if index not in broken]), ids


def _verified(training: PairDataset, evaluation: PairDataset) -> set[int]:
    """Read every pair, and return the class ids of the training masks; raise ValueError if a pair is broken."""
    threads = os.cpu_count() or 1
    (broken, learned), (more, _) = training.scan(threads), evaluation.scan(threads)
    problems = [*broken.values(), *more.values()]
    refuse(problems, f"{len(problems)} of {len(training) + len(evaluation)} pairs are broken")
    return learned


def _check_ids(training: PairDataset, evaluation: PairDataset, all_learned: set[int] | None) -> None:
    """Raise ValueError if training masks have fewer than two classes; warn of absent ones and empty evaluation masks.

    Args:
        training: the training pairs.
        evaluation: the evaluation pairs.
        all_learned: the class ids of the training masks, if all of them were read.
    """
    code = training.code
    nothing = f"every pixel of every mask is ignored (id {code.ignore_index}), the first being "
    mend = "Check num_classes, ignore_index, and what maps ids or colours to classes."
    learned = training.ids_seen(2) if all_learned is None else all_learned
    if learned is not None and not learned:
        raise ValueError(f"nothing to train on: {nothing}{training.pairs.masks[0]}. {mend}")
    if learned is not None and len(learned) == 1:
        raise ValueError(
            f"nothing to tell apart: every pixel of the training masks is of class {learned.pop()} or ignored (id "
            f"{code.ignore_index}), the first mask being {training.pairs.masks[0]}. {mend} Masks of 0 and 255 want "
            "id_map={0: 0, 255: 1}."
        )
    absent = set(range(code.num_classes)) - {code.ignore_index} - (all_learned or set())
    if all_learned is not None and absent:
        listed = format_names(sorted(absent))
        rank_zero_warn(f"no training mask holds class(es) {listed}, which cannot be learned. {mend}")
    if evaluation.ids_seen(1) == set():
        rank_zero_warn(f"nothing to evaluate on: {nothing}{evaluation.pairs.masks[0]}. {mend}")


def _example(data: PairDataset, transform: EvalTransform, size: Size) -> Tensor:
    """Return the first and the last image, normalised, cropped or padded to (2, 3, H, W) of `size`."""
    pairs = [transform(*data.read(index)) for index in (0, len(data) - 1)]
    return torch.stack([fitted(*pair, size, data.code.ignore_index)[0] for pair in pairs])


def _size(name: str, size: Sequence[int]) -> Size:
    if len(size) != 2 or not all(int(side) == side and side > 0 for side in size):
        raise ValueError(f"{name}={size} is no size: give (height, width) in pixels, both above 0.")
    return int(size[0]), int(size[1])
