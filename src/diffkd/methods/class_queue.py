"""A first-in, first-out memory of embeddings for every class."""

import torch
from torch import Tensor, nn

from diffkd.methods.counter_random import random_integers


class ClassQueue(nn.Module):
    """Keeps the last `size` embeddings of every class, in buffers.

    Nothing is fetched from the device: what is invalid goes to a spare row at the end.

    Args:
        classes: number of classes.
        size: entries for each.
        dim: length of an embedding.
    """

    entries: Tensor
    count: Tensor

    def __init__(self, classes: int, size: int, dim: int) -> None:
        super().__init__()
        if classes < 1 or size < 1:
            raise ValueError(f"a memory needs at least 1 class and 1 entry, got {classes} and {size}")
        self.classes, self.size = classes, size
        self.register_buffer("entries", torch.zeros(classes * size + 1, dim))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def push(self, candidates: Tensor, valid: Tensor) -> None:
        """Store candidates in order, over the oldest entries.

        Args:
            candidates: (classes, n, dim).
            valid: (classes, n) bool, which of them to store.

        Raises:
            ValueError: if n is above `size`.
        """
        if candidates.shape[1] > self.size:
            raise ValueError(
                f"a batch may bring {candidates.shape[1]} entries of a class, more than the memory of {self.size} "
                "holds; make the memory larger"
            )
        place = (self.count[:, None] + valid.cumsum(dim=1) - 1) % self.size
        start = torch.arange(self.classes, device=place.device)[:, None] * self.size
        row = torch.where(valid, start + place, self.classes * self.size)
        self.entries.index_copy_(0, row.flatten(), candidates.flatten(0, 1).to(self.entries.dtype))
        self.entries[-1] = 0
        self.count += valid.sum(dim=1)

    def draw(self, number: int, step: Tensor, stream: int = 0) -> tuple[Tensor, Tensor]:
        """Draw entries of every class, uniformly and with replacement.

        Args:
            number: how many of each class.
            step: scalar int64 that the draws follow from.
            stream: which of several independent sequences.

        Returns:
            (classes * number, dim) entries, and (classes * number,) bool, false for those of classes without entries.
        """
        filled = self.count.clamp(max=self.size)[:, None]
        place = random_integers(step, (self.classes, number), filled.clamp_min(1), stream)
        start = torch.arange(self.classes, device=place.device)[:, None] * self.size
        exists = (filled > 0).expand(-1, number)
        return self.entries[(start + place).flatten()], exists.flatten()
