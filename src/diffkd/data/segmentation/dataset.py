"""Data set and loaders over pairs of image and mask."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from diffkd.data.folders import quoted
from diffkd.data.images import OnBadImage, check_on_bad_image
from diffkd.data.loaders import SplitLoaders
from diffkd.data.seeding import digest_of, mix_seed
from diffkd.data.segmentation.masks import MaskCode, read_image
from diffkd.data.segmentation.pairs import Pairs, refuse
from diffkd.data.segmentation.transform import EvalTransform, SegmentationAugmentation, TrainTransform, fitted, resized
from diffkd.data.statistics import check_statistics

PairTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Scan(NamedTuple):
    """Hold what reading all pairs found.

    Args:
        problems: a message for each pair that is broken, by its index.
        ids: the class ids that the masks of the others hold.
    """

    problems: dict[int, str]
    ids: set[int]


class PairDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """Give (image, mask, index) for the key (epoch, index) that `EpochSampler` yields.

    What is drawn for a pair is a function of (seed, epoch, index), so that the number of workers, their timing and a
    resume change nothing. The random state of the process is left as it was.

    Args:
        pairs: files and sizes.
        code: what the pixels of masks mean.
        transform: image (3, H, W) uint8 and mask (H, W) to what the model is given.
        seed: seed of the augmentation.
        resize: (H, W) that images and masks are brought to first; None leaves them.
        full_size_masks: leave the masks at their own size.
        cache: "memory" keeps decoded and resized pairs in the memory of the process, three or four bytes a pixel.
    """

    def __init__(
        self,
        pairs: Pairs,
        code: MaskCode,
        transform: PairTransform,
        *,
        seed: int = 0,
        resize: tuple[int, int] | None = None,
        full_size_masks: bool = False,
        cache: Literal["none", "memory"] = "none",
    ) -> None:
        self.pairs = pairs
        self.code = code
        self.transform = transform
        self.seed = seed
        self.resize = resize
        self.full_size_masks = full_size_masks
        self._kept: dict[int, tuple[Tensor, Tensor]] | None = {} if cache == "memory" else None

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs.images)

    @property
    def digest(self) -> str:
        """A digest of the files."""
        return digest_of(self.pairs.images, self.pairs.masks)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """Return image (3, H, W) float32, mask (H, W) int64 and index; raise ValueError if a file is broken."""
        epoch, index = key
        image, mask = self.read(index)
        # Transforms of torchvision draw from the global generator of the CPU, and from no other.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return *self.transform(image, mask), index

    def sizes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return the (H, W) of every image and mask that an evaluation transform leaves whole."""
        image = [self.resize or size for size in self.pairs.sizes]
        mask = self.pairs.sizes if self.full_size_masks else image
        return list(zip(image, mask, strict=True))

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image (3, H, W) uint8 and mask (H, W) uint8 or int32 of class ids, resized but not augmented.

        Raises:
            ValueError: if a file is broken, a mask holds an id or a colour of no class, or their sizes differ.
        """
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        path, mask_path = self.pairs.images[index], self.pairs.masks[index]
        image = torch.from_numpy(read_image(path)).permute(2, 0, 1)  # (H, W, 3) to (3, H, W)
        mask = torch.from_numpy(self.code.read(mask_path))
        if image.shape[1:] != mask.shape:
            raise ValueError(
                f"image {path} is {tuple(image.shape[1:])} pixels upright, in height and width, but its mask "
                f"{mask_path} is {tuple(mask.shape)}; give both the same size."
            )
        if self.resize:
            full = mask
            image, mask = resized(image, mask, self.resize)
            mask = full if self.full_size_masks else mask
        pair = image.as_subclass(Tensor).contiguous(), mask.as_subclass(Tensor)
        if self._kept is not None:
            self._kept[index] = pair
        return pair

    def ids_seen(self, enough: int) -> set[int] | None:
        """Return class ids that the masks hold; None if a mask is broken, which whoever reads the pair will say.

        Args:
            enough: how many different ones to look for. Masks are read until they are found: usually one mask.
        """
        seen: set[int] = set()
        # Not one after the other: masks without any object are often neighbours.
        step = math.isqrt(len(self)) + 1
        for index in sorted(range(len(self)), key=lambda index: index % step):
            try:
                mask = self.code.read(self.pairs.masks[index])
            except ValueError:
                return None
            seen |= self._ids(mask)
            if len(seen) >= enough:
                break
        return seen

    def scan(self, threads: int = 1) -> Scan:
        """Decode every pair once."""
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            found = list(pool.map(self._look, range(len(self))))
        problems = {index: one for index, one in enumerate(found) if isinstance(one, str)}
        return Scan(problems, set().union(*(one for one in found if isinstance(one, set))))

    def _look(self, index: int) -> str | set[int]:
        try:
            return self._ids(self.read(index)[1].numpy())
        except ValueError as error:
            return str(error)

    def _ids(self, mask: npt.NDArray[Any]) -> set[int]:
        return set(np.unique(mask).tolist()) - {self.code.ignore_index}


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
        on_bad_image: "error" or "skip", see `MaskFolder`.

    Attributes:
        splits: the loaders; evaluation images are whole, and those of one size share a batch.
        skipped: one message per pair left out.

    Raises:
        ValueError: if a value is out of range, the pixels that count in the training masks are not of two classes at
            least, or `verify` finds a broken pair.
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
        on_bad_image: OnBadImage = "error",
    ) -> None:
        if cache not in ("none", "memory"):
            raise ValueError(f"cache={cache!r}: give 'none' or 'memory'.")
        check_on_bad_image(on_bad_image)
        check_statistics(mean, std)
        self.resize = None if resize is None else _size("resize", resize)
        self.crop_size = self.resize or (512, 512) if crop_size is None else _size("crop_size", crop_size)
        self.val_batch_size = (batch_size if self.resize else 1) if val_batch_size is None else val_batch_size
        for name, value in (("batch_size", batch_size), ("val_batch_size", self.val_batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} is not a number of images: give 1 or more.")
        if num_workers is None:
            num_workers = 0 if cache == "memory" else min(8, os.cpu_count() or 1)
        self.num_workers = num_workers
        crop = TrainTransform(augmentation, self.crop_size, code.ignore_index, mean, std)
        whole = EvalTransform(mean, std)
        self.skipped: list[str] = []
        all_learned: set[int] | None = None  # known where every mask was read
        if on_bad_image == "skip":
            train, all_learned = self._without_broken(PairDataset(train, code, whole), "training")
            val, _ = self._without_broken(PairDataset(val, code, whole), "evaluation")
        training = PairDataset(train, code, crop, seed=seed, resize=self.resize, cache=cache)
        evaluation = PairDataset(val, code, whole, resize=self.resize, full_size_masks=full_size_masks, cache=cache)
        if verify and on_bad_image == "error":
            threads = os.cpu_count() or 1
            (broken, all_learned), (more, _) = training.scan(threads), evaluation.scan(threads)
            problems = [*broken.values(), *more.values()]
            refuse(problems, f"{len(problems)} of {len(training) + len(evaluation)} pairs are broken")
        nothing = f"every pixel of every mask is ignored (id {code.ignore_index}), the first being "
        mend = "Check num_classes, ignore_index, and what maps ids or colours to classes."
        learned = training.ids_seen(2) if all_learned is None else all_learned
        if learned is not None and not learned:
            raise ValueError(f"nothing to train on: {nothing}{train.masks[0]}. {mend}")
        if learned is not None and len(learned) == 1:
            raise ValueError(
                f"nothing to tell apart: every pixel of the training masks is of class {learned.pop()} or ignored (id "
                f"{code.ignore_index}), the first mask being {train.masks[0]}. {mend} Masks of 0 and 255 want "
                "id_map={0: 0, 255: 1}."
            )
        absent = set(range(code.num_classes)) - {code.ignore_index} - (all_learned or set())
        if all_learned is not None and absent:
            listed = quoted(sorted(absent))
            rank_zero_warn(f"no training mask holds class(es) {listed}, which cannot be learned. {mend}")
        if evaluation.ids_seen(1) == set():
            rank_zero_warn(f"nothing to evaluate on: {nothing}{val.masks[0]}. {mend}")
        self.splits = SplitLoaders(
            training,
            evaluation,
            partial(_example, training, whole, self.crop_size),
            batch_size=batch_size,
            val_batch_size=self.val_batch_size,
            seed=seed,
            num_workers=num_workers,
            sizes=evaluation.sizes(),
        )

    def _without_broken(self, data: PairDataset, split: str) -> tuple[Pairs, set[int]]:
        """Return the pairs that can be read, and their class ids; collect and warn of the others."""
        broken, ids = data.scan(os.cpu_count() or 1)
        problems = list(broken.values())
        counted = f"{len(broken)} of {len(data)} {split} pairs are"
        if len(broken) == len(data):
            refuse(problems, f"{counted} broken, so that none is left")
        if broken:
            listed = "\n  ".join(problems[:10])
            rank_zero_warn(f"{counted} left out:\n  {listed}")
        self.skipped += problems
        return data.pairs.select([index for index in range(len(data)) if index not in broken]), ids


def _example(data: PairDataset, transform: EvalTransform, size: Size) -> Tensor:
    """Return the first and the last image, normalised, cut or padded to (2, 3, H, W) of `size`."""
    pairs = [transform(*data.read(index)) for index in (0, len(data) - 1)]
    return torch.stack([fitted(*pair, size, data.code.ignore_index)[0] for pair in pairs])


def _size(name: str, size: Sequence[int]) -> Size:
    if len(size) != 2 or not all(int(side) == side and side > 0 for side in size):
        raise ValueError(f"{name}={size} is no size: give (height, width) in pixels, both above 0.")
    return int(size[0]), int(size[1])
