"""A held-out part of the training data for model selection, so that the test data are never used for it."""

import copy
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffkd.data.classification.in_memory import ImageSet, InMemory
from diffkd.data.detection.dataset import DetectionDataset
from diffkd.data.image_data import ImageData, Loaders
from diffkd.data.loaders import KeyedDataset, SplitLoaders
from diffkd.data.seeding import digest_of, mix_seed


def hold_out(data: Any, share: float = 0.2, seed: int = 0) -> ImageData:
    """Return a copy of the data whose evaluation and test images are a held-out part of the training images.

    The part is a function of data, share and seed. It is stratified: by label for classification, by each image's
    rarest class for detection; for segmentation it is drawn at random. Held-out images are not augmented. Normalisation
    and classes do not change.

    Args:
        data: a data module of this package.
        share: share of the training images to hold out, in (0, 1).
        seed: seed of the draw.

    Returns:
        A copy that shares the images with `data`; `data` is not changed.

    Raises:
        ValueError: if `share` is not in (0, 1), one of the two parts is empty, or the data module is not of this
            package.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} of the training images cannot be held back: give more than 0 and less than 1")
    loaders = getattr(data, "_loaders", None)
    if not isinstance(data, ImageData) or not isinstance(loaders, InMemory | SplitLoaders):
        raise ValueError(
            f"{type(data).__name__} does not show its training images, of which a part is to be held back: take a data "
            "module of diffkd.data"
        )
    changed = copy.copy(data)
    changed._loaders = (
        _in_memory(loaders, share, seed) if isinstance(loaders, InMemory) else _split(loaders, share, seed)
    )
    return changed


def stratified_split(strata: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices at random, with the same share of every stratum held out.

    Args:
        strata: the stratum of each of N samples.
        share: share to hold out, in (0, 1).
        seed: seed of the draw.

    Returns:
        The indices kept and the indices held out, each sorted. A stratum of one sample is kept. Where the share of
        every stratum rounds to none, as of many classes of few samples, they give one in turn until it is reached.

    Raises:
        ValueError: if one of the two is empty.

    >>> kept, held = stratified_split([0, 0, 0, 0, 1, 1, 1, 1], 0.25, seed=0)
    >>> len(kept), len(held), min(held) < 4 <= max(held)
    (6, 2, True)
    """
    groups: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        groups.setdefault(stratum, []).append(index)
    generator = torch.Generator().manual_seed(mix_seed(seed, len(strata)))
    held: set[int] = set()
    small = max(round(share * len(members)) for members in groups.values()) == 0 if groups else False
    owed = 0.0
    for _, members in sorted(groups.items(), key=lambda item: str(item[0])):
        order = torch.randperm(len(members), generator=generator).tolist()
        count = round(share * len(members))
        if small:
            owed += share * len(members)
            count = int(owed >= 1 and len(members) > 1)
            owed -= count
        held |= {members[index] for index in order[:count]}
    kept = [index for index in range(len(strata)) if index not in held]
    if not kept or not held:
        raise ValueError(
            f"a share of {share} of {len(strata)} training images leaves {len(kept)} to train on and {len(held)} to "
            "measure by: give another share, or more images"
        )
    return kept, sorted(held)


class KeyedSubset(Dataset[Any]):
    """A subset of a data set, with its own indices from 0.

    Args:
        whole: the data set: (image, label or target, index) for each key (epoch, index).
        indices: indices of the subset's samples in `whole`.
    """

    def __init__(self, whole: KeyedDataset, indices: list[int]) -> None:
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    @property
    def digest(self) -> str:
        """A digest of the whole data set and the chosen indices."""
        return digest_of([getattr(self.whole, "digest", None)], self.indices)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any, int]:
        """Return the sample, with its index in this part."""
        epoch, index = key
        image, label, _ = self.whole[epoch, self.indices[index]]
        return image, label, index


def _in_memory(loaders: InMemory, share: float, seed: int) -> InMemory:
    images, labels = loaders.train

    def part(indices: list[int]) -> ImageSet:
        return ImageSet(images[indices], labels[indices])

    # Images of several classes are drawn by the whole set of these.
    strata = [tuple(row) for row in labels.tolist()] if labels.ndim == 2 else labels.tolist()
    kept, held = stratified_split(strata, share, seed)
    changed = copy.copy(loaders)
    changed.train, changed.val = part(kept), part(held)
    return changed


def _split(loaders: SplitLoaders, share: float, seed: int) -> Loaders:
    train: Any = loaders.train
    if type(train) is not type(loaders.val):
        raise ValueError("training and evaluation images are read in two ways, so that none can take the others' place")
    kept, held = stratified_split(_strata(train), share, seed)
    plain = copy.copy(train)
    for name in ("transform", "augmentation", "flip"):  # applied to training images only
        if hasattr(train, name):
            setattr(plain, name, getattr(loaders.val, name))
    # If a batch may hold only one image size, use batches of one image.
    alone = {"sizes": None, "val_batch_size": 1} if loaders.sizes is not None else {}
    return replace(loaders, train=KeyedSubset(train, kept), val=KeyedSubset(plain, held), test=None, **alone)  # type: ignore[arg-type]


def _strata(dataset: Any) -> list[Hashable]:
    if isinstance(dataset, DetectionDataset):
        return _rarest(dataset)
    labels = getattr(getattr(dataset, "samples", None), "labels", None)
    return [0] * len(dataset) if labels is None else [int(label) for label in labels]


def _rarest(dataset: DetectionDataset) -> list[Hashable]:
    """Return for each image the class of its boxes that occurs in the fewest images; 0 without boxes."""
    present = [set(_integers(dataset.annotations.of(index).labels)) for index in range(len(dataset))]
    count = Counter(label for labels in present for label in labels)
    return [min(labels, key=lambda label: (count[label], label), default=0) for labels in present]


def _integers(labels: Tensor) -> list[int]:
    return [int(label) for label in labels.tolist()]
