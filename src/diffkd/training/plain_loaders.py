"""PyTorch's own loaders in a training of several processes: each process gets its part of the samples."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, distributed
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from diffkd.tasks.distributed import several_processes


class Part(Sampler[int]):
    """Every `world_size`-th index from `rank` on: all parts together hold each index exactly once.

    Args:
        size: number of samples.
        rank: this process among `world_size`.
        world_size: number of processes.
    """

    def __init__(self, size: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, size, world_size)

    def __len__(self) -> int:
        """Return the number of indices of this part."""
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices in order."""
        return iter(self.indices)


@contextmanager
def divided_loaders(data: LightningDataModule, seed: int) -> Iterator[None]:
    """Within this context, plain loaders of a data module are divided over the processes of its trainer.

    Loaders of other classes, over iterable data sets, or with samplers of one's own are expected to divide themselves;
    see :func:`check_apart`.

    Args:
        data: the data module.
        seed: of the order of shuffled samples.
    """
    before = {name: vars(data).get(name) for name in ("train_dataloader", "val_dataloader")}
    for name in before:
        make = _dividing(getattr(data, name), data, seed, train=name.startswith("train"))
        setattr(data, name, make)
    try:
        yield
    finally:
        for name, own in before.items():
            delattr(data, name)
            if own is not None:
                setattr(data, name, own)


def _dividing(make: Callable[[], Any], data: LightningDataModule, seed: int, *, train: bool) -> Callable[[], Any]:
    @functools.wraps(make)  # the trainer sees from it whether the data module has this method
    def made() -> Any:
        loader, trainer = make(), data.trainer
        if trainer is None or trainer.world_size == 1 or not isinstance(loader, DataLoader):
            return loader
        epoch = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        divide(loader, rank=trainer.global_rank, world_size=trainer.world_size, train=train, seed=seed, epoch=epoch)
        return loader

    return made


def divide(loader: DataLoader[Any], *, rank: int, world_size: int, train: bool, seed: int = 0, epoch: int = 0) -> None:
    """Let a loader of PyTorch give this process its part, if its sampler is one of PyTorch's for a single process.

    In training all parts have the same length, for which up to `world_size - 1` samples are given twice, as by
    PyTorch's `DistributedSampler`; in evaluation every sample is in exactly one part. The batch size stays.

    Args:
        loader: changed in place.
        rank: this process among `world_size`.
        world_size: number of processes.
        train: whether the loader is for training.
        seed: of the order, if the samples are shuffled.
        epoch: that is iterated first.

    Raises:
        ValueError: if its sampler cannot be divided.
    """
    batches = loader.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        return
    sampler = loader.sampler if batches is None else batches.sampler
    if type(sampler).__module__ != RandomSampler.__module__:
        return  # of an iterable data set, a DistributedSampler, or of one's own
    whole = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and len(sampler) == len(loader.dataset)  # type: ignore[arg-type]
    )
    if not whole or batches is None:
        what = type(sampler).__name__ + ("" if batches is not None else " with batch_size=None")
        raise ValueError(
            f"{world_size} processes would take the same samples, as the loader's {what} knows of one process only: "
            "give the loader a DistributedSampler, or a sampler of your own that divides by self.trainer.global_rank "
            "and self.trainer.world_size of the data module, or take --devices 1"
        )
    if train:
        part: Sampler[int] = DistributedSampler(
            loader.dataset,
            num_replicas=world_size,
            rank=rank,
            shuffle=isinstance(sampler, RandomSampler),
            seed=seed,
        )
        part.set_epoch(epoch)  # type: ignore[attr-defined]  # workers may draw indices before the trainer sets it
    else:
        part = Part(len(loader.dataset), rank, world_size)  # type: ignore[arg-type]
    batches.sampler = part


def check_apart(indices: Tensor) -> None:
    """Raise ValueError if two processes were given the same batch; a collective call.

    Args:
        indices: of the samples of this process' batch, (B,).
    """
    if not several_processes():
        return
    count = torch.tensor([len(indices)], device=indices.device)
    sizes = [torch.empty_like(count) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, count)
    shortest = min(int(size) for size in sizes)
    if shortest < 2:
        return  # samplers that draw with replacement may give two processes the same single sample
    ours = indices[:shortest].contiguous()
    every = [torch.empty_like(ours) for _ in sizes]
    distributed.all_gather(every, ours)
    if len({tuple(other.tolist()) for other in every}) < len(every):
        raise ValueError(
            f"two of the {len(every)} processes were given the same first batch (samples {ours[:4].tolist()}...), so "
            "that they would train on the same images: let the loader of the data module divide them by "
            "self.trainer.global_rank and self.trainer.world_size, and give each image its index in the whole data "
            "set, or take --devices 1"
        )
