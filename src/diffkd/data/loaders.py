"""Loaders whose samples are decoded by worker processes; order and augmentation do not depend on the workers."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from diffkd.data.image_data import Loader, placement
from diffkd.data.sampler import EpochSampler, SizeBatches, drops_last


class PackedBatch:
    """A batch whose tensors are concatenated into one flat tensor per dtype.

    A worker process sends one file descriptor per tensor, and a process may open about a thousand: a batch of a hundred
    images with boxes in separate tensors would exceed that.

    Args:
        batch: tensors, nested in lists, tuples and mappings.
    """

    def __init__(self, batch: Any) -> None:
        parts: dict[torch.dtype, list[Tensor]] = {}
        self._sizes: dict[torch.dtype, int] = {}
        self._layout = self._packed(batch, parts)
        self._buffers = {kind: torch.cat(tensors) for kind, tensors in parts.items()}

    def pin_memory(self) -> "PackedBatch":
        """Move the tensors to pinned memory; called by PyTorch's `DataLoader`."""
        self._buffers = {kind: buffer.pin_memory() for kind, buffer in self._buffers.items()}
        return self

    def unpacked(self) -> Any:
        """Return the batch; its tensors are views."""
        return self._unpacked(self._layout)

    def _packed(self, value: Any, parts: dict[torch.dtype, list[Tensor]]) -> Any:
        if isinstance(value, Tensor):
            start = self._sizes.get(value.dtype, 0)
            self._sizes[value.dtype] = start + value.numel()
            parts.setdefault(value.dtype, []).append(value.reshape(-1))
            return _Place(value.dtype, start, tuple(value.shape))
        if isinstance(value, dict):
            return {key: self._packed(item, parts) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._packed(item, parts) for item in value]
        return value

    def _unpacked(self, value: Any) -> Any:
        if isinstance(value, _Place):
            end = value.start + math.prod(value.shape)
            return self._buffers[value.dtype][value.start : end].view(value.shape)
        if isinstance(value, dict):
            return {key: self._unpacked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._unpacked(item) for item in value]
        return value


class _Place(NamedTuple):
    """Position and shape of a tensor inside the flat tensor of its dtype."""

    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Packing:
    """Collate samples and pack the batch; a class, so that worker processes can unpickle it."""

    collate: Callable[[list[Any]], tuple[Any, Any, Any]]

    def __call__(self, samples: list[Any]) -> PackedBatch:
        return PackedBatch(self.collate(samples))


class KeyedDataset(Protocol):
    """A data set that returns (image, label, index) for each key (epoch, index)."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, key: tuple[int, int], /) -> tuple[Any, Any, int]:
        """Return an image, its label, mask or target, and its index."""
        ...


class FolderLoader:
    """Iterate over (images, labels, indices) of a `KeyedDataset`; the counterpart of `DeviceLoader` for files.

    Args:
        dataset: the data set, such as a `FolderDataset`.
        batch_size: images per batch and process.
        shuffle: True for training, False for evaluation; see `EpochSampler` for how it affects the ranks' shards.
        seed: seed of the order.
        num_workers: persistent worker processes; 0 decodes in this process.
        pin_memory: put batches in pinned memory, for copies to CUDA.
        drop_last: drop a short last batch; None drops it only in training, and only if it holds one image, or two at
            batch size 8 or more.
        rank: this process among `world_size`.
        world_size: number of processes.
        start_batch: batches to skip in the first epoch that is iterated; `len` still counts them.
        collate: function from a list of samples to a batch; None stacks them.
        sizes: for evaluation, the size of every sample: a batch ends where the size changes. None if all sizes are
            equal.

    Yields:
        images (B, C, H, W) float32 normalised, labels (B,) or masks (B, H, W) int64, indices (B,) int64 into the data
        set; on the CPU. With `collate`, the three values it returns.

    Raises:
        ValueError: if there are too few samples for one batch; while iterating, if a file is broken.
    """

    def __init__(
        self,
        dataset: KeyedDataset,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        collate: Callable[[list[Any]], tuple[Any, Any, Any]] | None = None,
        sizes: Sequence[Hashable] | None = None,
    ) -> None:
        # Lightning calls `sampler.set_epoch` of the loader, and expects a batch sampler beside the sampler.
        self.batch_sampler = None
        self.sampler = EpochSampler(
            len(dataset), seed=seed, shuffle=shuffle, rank=rank, world_size=world_size, start=start_batch * batch_size
        )
        self.batch_size = batch_size
        self.start_batch = start_batch
        self.drop_last = drops_last(len(self.sampler), batch_size, train=shuffle, drop_last=drop_last)
        batches: dict[str, Any] = {"batch_size": batch_size, "sampler": self.sampler, "drop_last": self.drop_last}
        if sizes is not None:
            batches = {"batch_sampler": SizeBatches(self.sampler, sizes, batch_size)}
        self._loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]  # typed as `Dataset`; only `__len__` and `__getitem__` are used
            **batches,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=_Packing(collate) if collate is not None and num_workers > 0 else collate,
            # Seeds the workers; without it each epoch would draw from the global generator.
            generator=torch.Generator(),
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (counted from 0) that the next iteration runs."""
        self.sampler.set_epoch(epoch)

    @property
    def digest(self) -> str | None:
        """The digest of the data set, None if it has none."""
        return getattr(self._loader.dataset, "digest", None)

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yield the batches of the current epoch; workers start at the first batch.

        This is a generator because Lightning calls `iter` before `set_epoch` when it resumes: a `DataLoader` would
        already have sent its workers the indices of epoch 0.
        """
        for batch in self._loader:
            if isinstance(batch, PackedBatch):
                batch = batch.unpacked()
            yield batch[0], batch[1], batch[2]


@dataclass(frozen=True)
class SplitLoaders:
    """Make loaders over training, evaluation and test samples.

    Args:
        train: training samples, augmented.
        val: evaluation samples.
        example: returns two training images, preprocessed as model input, on the CPU.
        batch_size: images per batch and process.
        seed: seed of the order.
        test: test samples; None uses `val`.
        val_batch_size: evaluation images per batch and process; None uses `batch_size`.
        num_workers: worker processes of each loader.
        drop_last: as for `FolderLoader`.
        collate: likewise.
        sizes: the size of every evaluation sample, if all samples of a batch must have one size.
    """

    train: KeyedDataset
    val: KeyedDataset
    example: Callable[[], Any]
    batch_size: int
    seed: int
    test: KeyedDataset | None = None
    val_batch_size: int | None = None
    num_workers: int = 0
    drop_last: bool | None = None
    collate: Callable[[list[Any]], tuple[Any, Any, Any]] | None = None
    sizes: Sequence[Hashable] | None = None

    def train_loader(self, trainer: Trainer | None, start_batch: int = 0) -> FolderLoader:
        """Return shuffled batches of the training samples; the first epoch begins at `start_batch`."""
        return self._loader(self.train, trainer, self.batch_size, shuffle=True, start_batch=start_batch)

    def val_loader(self, trainer: Trainer | None) -> FolderLoader:
        """Return the evaluation samples in order, each exactly once over all ranks."""
        return self._loader(self.val, trainer, self.val_batch_size or self.batch_size, sizes=self.sizes)

    def test_loader(self, trainer: Trainer | None) -> FolderLoader:
        """Return the test samples in order, each exactly once over all ranks."""
        if self.test is None:
            return self.val_loader(trainer)
        return self._loader(self.test, trainer, self.val_batch_size or self.batch_size)

    def _loader(
        self,
        dataset: KeyedDataset,
        trainer: Trainer | None,
        batch_size: int,
        *,
        shuffle: bool = False,
        start_batch: int = 0,
        sizes: Sequence[Hashable] | None = None,
    ) -> FolderLoader:
        place = placement(trainer)
        return FolderLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            num_workers=self.num_workers,
            pin_memory=place.device.type == "cuda",
            drop_last=self.drop_last,
            rank=place.rank,
            world_size=place.world_size,
            start_batch=start_batch,
            collate=self.collate,
            sizes=sizes,
        )


HELD_OUT, BANK, QUERIES = 0, 1, 2
"""The kinds: images by which agreement with the teacher is measured (with labels, they are queries too); labelled
images among which nearest neighbours are searched and by which a linear probe is trained; labelled images to classify.
"""


class InTurn:
    """Iterate over several loaders one after the other.

    Args:
        parts: for each loader its kind, and the loader.

    Yields:
        images, labels (-1: none) and indices as the loader does, and the kind.
    """

    def __init__(self, parts: Sequence[tuple[int, Loader]]) -> None:
        self.parts = list(parts)
        self.batch_sampler = None

    @property
    def sampler(self) -> EpochSampler:
        """The order of the first loader."""
        return self.parts[0][1].sampler

    @property
    def digest(self) -> str | None:
        """The digest of the first loader."""
        return self.parts[0][1].digest

    def __len__(self) -> int:
        """Return the number of batches of all loaders."""
        return sum(len(loader) for _, loader in self.parts)

    def __iter__(self) -> Iterator[tuple[Any, Any, Any, int]]:
        """Yield the batches of each loader in turn."""
        for kind, loader in self.parts:
            for images, labels, indices in loader:
                yield images, labels, indices, kind


@dataclass(frozen=True)
class UnlabelledLoaders(SplitLoaders):
    """Loaders over unlabelled images, whose evaluation batches include those of a labelled probe.

    Args:
        bank: labelled images by which the queries are classified; None: there is no probe.
        queries: labelled images to classify; None: the evaluation images have labels.
    """

    bank: KeyedDataset | None = None
    queries: KeyedDataset | None = None

    def val_loader(self, trainer: Trainer | None) -> Any:
        """Return the held-out images, then bank and queries of the probe, each image exactly once over all ranks."""
        parts: list[tuple[int, Loader]] = [(HELD_OUT, super().val_loader(trainer))]
        for part, dataset in ((BANK, self.bank), (QUERIES, self.queries)):
            if dataset is not None:
                parts.append((part, self._loader(dataset, trainer, self.val_batch_size or self.batch_size)))
        return InTurn(parts)

    def test_loader(self, trainer: Trainer | None) -> Any:
        """Return the same as `val_loader`."""
        return self.val_loader(trainer)
