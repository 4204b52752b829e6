"""Loaders over the splits of a data set whose samples are read one by one."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from diffkd.data.folder_loader import FolderLoader, KeyedDataset
from diffkd.data.placement import placement


@dataclass(frozen=True)
class SplitLoaders:
    """Make loaders over training, evaluation and test samples.

    Args:
        train: training samples, augmented.
        val: evaluation samples.
        example: returns two training images as models see them, on the CPU.
        batch_size: images per batch and process.
        seed: seed of the order.
        test: test samples; None takes `val`.
        val_batch_size: evaluation images per batch and process; None takes `batch_size`.
        num_workers: worker processes of each loader.
        drop_last: as for `FolderLoader`.
        collate: likewise.
        sizes: the size of every evaluation sample, where a batch is to hold one size only.
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
        """Return the test samples, likewise."""
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
