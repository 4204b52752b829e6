"""Sample order as a function of seed and epoch, sharded by rank; batches of one image size."""

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from diffkd.data.seeding import mix_seed


class EpochSampler(Sampler[tuple[int, int]]):
    """Yield (epoch, index) for every sample of this rank's shard.

    The order of an epoch is a pure function of (seed, epoch), equal on all ranks and devices. In training
    (`shuffle=True`) the ranks' shards are disjoint and of equal length: at most `world_size - 1` samples are left out,
    different ones in every epoch. In evaluation (`shuffle=False`) every sample is in exactly one shard, and shards may
    differ in length by one. If all ranks use batch size B, the union of their b-th batches is the b-th batch of a
    single process with batch size B * `world_size`.

    Each item contains the epoch, because `set_epoch` does not reach worker processes.

    Args:
        size: number of samples in the data set.
        seed: seed of the shuffling.
        shuffle: True for training, False for evaluation.
        rank: this process among `world_size`.
        world_size: number of processes.
        start: samples of this shard to skip in the first iterated epoch; for a resume in mid-epoch.

    Attributes:
        views: if set to n, order and augmentation repeat every n epochs; None: every epoch differs.

    Raises:
        ValueError: if there are fewer samples than processes in training, or a number is out of range.
    """

    def __init__(
        self, size: int, *, seed: int = 0, shuffle: bool = False, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}: give 0 <= rank < world_size.")
        if start < 0:
            raise ValueError(f"cannot skip {start} samples: give a start of 0 or more.")
        if size < (world_size if shuffle else 1):
            raise ValueError(
                f"{size} samples are too few for {world_size} process(es): use more data or fewer devices."
            )
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.epoch = 0
        self.views: int | None = None
        self._first_epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (counted from 0) that the next iteration runs; Lightning calls this by itself."""
        self.epoch = epoch

    @property
    def view(self) -> int:
        """The epoch that determines order and augmentation: the current epoch, modulo `views` if set."""
        return self.epoch if self.views is None else self.epoch % self.views

    def __len__(self) -> int:
        """Return the number of samples of the shard, including those skipped by `start`."""
        if self.shuffle:
            return self.size // self.world_size
        return len(range(self.rank, self.size, self.world_size))

    def order(self) -> Tensor:
        """Return this rank's sample indices in the current epoch, (len(self),) int64 on the CPU; ignores `start`."""
        if not self.shuffle:
            return torch.arange(self.size)[self.rank :: self.world_size].clone()
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.view))
        shuffled = torch.randperm(self.size, generator=generator)
        return shuffled[self.rank : len(self) * self.world_size : self.world_size].clone()

    def skipped(self) -> int:
        """Return how many samples are skipped at the start of the current epoch: `start` in the first one, then 0."""
        if self._first_epoch is None:
            self._first_epoch = self.epoch
        return self.start if self.epoch == self._first_epoch else 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, index) in the order of the current epoch."""
        epoch, skipped = self.view, self.skipped()
        for index in self.order()[skipped:].tolist():
            yield epoch, index


def drops_last(samples: int, batch_size: int, *, train: bool, drop_last: bool | None = None) -> bool:
    """Decide whether a short last batch is dropped.

    Args:
        samples: samples per process and epoch.
        batch_size: samples per batch and process.
        train: True for training. A batch of one sample is dropped because BatchNorm cannot normalise it. A batch of
            two, at batch size 8 or more, is dropped because BatchNorm maps any two values to -1 and 1: through several
            such layers, as in DiffKD on logits, gradients grow a millionfold.
        drop_last: the user's choice; None applies the rule above.

    Returns:
        True if the last batch must be dropped.

    Raises:
        ValueError: if the batch size is below 1, or if no batch would be left.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not a number of images: give 1 or more.")
    if drop_last is None:
        short = samples % batch_size
        drop_last = train and batch_size > 1 and (short == 1 or (short == 2 and samples > batch_size >= 8))
    if drop_last and samples < batch_size:
        raise ValueError(
            f"{samples} sample(s) per process fill no batch of {batch_size} and the last batch is dropped: "
            "lower batch_size or use more data."
        )
    return drop_last


class SizeBatches(Sampler[list[tuple[int, int]]]):
    """Yield the items of a sampler in order, in batches of items of equal size.

    Args:
        sampler: yields (epoch, index).
        sizes: the size of every index, or any other key that must be equal within a batch.
        batch_size: largest number of items in a batch.

    Raises:
        ValueError: if `batch_size` is below 1.
    """

    def __init__(self, sampler: EpochSampler, sizes: Sequence[Hashable], batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"val_batch_size {batch_size} is not a number of images: give 1 or more.")
        self.sampler = sampler
        self.sizes = sizes
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Return the number of batches."""
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of (epoch, index)."""
        batch: list[tuple[int, int]] = []
        for item in self.sampler:
            if batch and (len(batch) == self.batch_size or self.sizes[item[1]] != self.sizes[batch[0][1]]):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch
