"""Batches of neighbours of one size, for whole images of any size."""

from collections.abc import Hashable, Iterator, Sequence

from torch.utils.data import Sampler

from diffkd.data.sampler import EpochSampler


class SizeBatches(Sampler[list[tuple[int, int]]]):
    """Yield the items of a sampler in its order, in batches in which all are of one size.

    Args:
        sampler: yields (epoch, index).
        sizes: the size of every index, or whatever must be equal in a batch.
        batch_size: items in a batch at most.

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
