"""Data set of pairs of image and mask."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffkd.data.images import WHITE
from diffkd.data.seeding import digest_of, mix_seed
from diffkd.data.segmentation.masks import MaskCode, read_image
from diffkd.data.segmentation.pairs import Pairs
from diffkd.data.segmentation.transform import resized

PairTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Scan(NamedTuple):
    """Result of reading all pairs.

    Args:
        problems: one message per broken pair, by its index.
        ids: the class ids in the masks of the other pairs.
    """

    problems: dict[int, str]
    ids: set[int]


class PairDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """Return (image, mask, index) for the key (epoch, index) of `EpochSampler`.

    The augmentation of a pair is a function of (seed, epoch, index), so the number of workers, their timing and a
    resume do not change it. The random state of the process is not changed.

    Args:
        pairs: files and sizes.
        code: mapping from mask pixels to class ids.
        transform: from image (3, H, W) uint8 and mask (H, W) to the model's input and target.
        seed: seed of the augmentation.
        resize: (H, W) to which images and masks are resized first; None does not resize.
        full_size_masks: do not resize the masks.
        cache: "memory" keeps decoded and resized pairs in the memory of the process, three or four bytes per pixel.
        white: the value of 16-bit images that becomes 255.
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
        white: int = WHITE,
    ) -> None:
        self.pairs = pairs
        self.code = code
        self.transform = transform
        self.seed = seed
        self.resize = resize
        self.full_size_masks = full_size_masks
        self.white = white
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
        # torchvision's transforms draw only from the global CPU generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return *self.transform(image, mask), index

    def sizes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return the (H, W) of every image and mask if the transform keeps their size."""
        image = [self.resize or size for size in self.pairs.sizes]
        mask = self.pairs.sizes if self.full_size_masks else image
        return list(zip(image, mask, strict=True))

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image (3, H, W) uint8 and mask (H, W) uint8 or int32 of class ids, resized but not augmented.

        Raises:
            ValueError: if a file is broken, a mask contains an id or colour of no class, or the sizes differ.
        """
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        path, mask_path = self.pairs.images[index], self.pairs.masks[index]
        image = torch.from_numpy(read_image(path, self.white)).permute(2, 0, 1)  # (H, W, 3) to (3, H, W)
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
        """Return class ids in the masks; None if a mask is broken, which is reported when the pair is read.

        Args:
            enough: number of different ids to find. Masks are read until they are found, usually one mask.
        """
        seen: set[int] = set()
        # In a spread-out order: masks without objects are often neighbours.
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
