"""Batches of a data set in device memory, without worker processes or copies."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffkd.data.classification.augmentation import Augmentation, augment, normalise, to_float
from diffkd.data.sampler import EpochSampler, drops_last
from diffkd.data.seeding import digest_of, mix_seed
from diffkd.data.statistics import check_statistics


class DeviceLoader:
    """Iterate over (images, labels, indices) of a data set held in tensors.

    The order of epoch e is a function of (seed, e) and the augmentation of its batch b one of (seed, e, b, rank): a
    resumed run needs only e and b, no random state. The order is the same on every device; augmentation uses the
    device's generator, so it repeats only on the same kind of device.

    Args:
        images: (N, C, H, W) uint8, or floats, on the device of the batches.
        labels: (N,) or (N, K) int64 on the same device.
        batch_size: images per batch and process.
        mean: one value per channel, in units of [0, 1] for uint8 images and in the images' own for floats.
        std: one value per channel, likewise.
        augmentation: augmentation of training images; None only normalises.
        seed: seed of order and augmentation.
        shuffle: True for training, False for evaluation; see `EpochSampler` for how it affects the ranks' shards.
        drop_last: drop a short last batch; None drops it only in training, and only if it holds one image, or two at
            batch size 8 or more.
        rank: this process among `world_size`.
        world_size: number of processes.
        start_batch: batches to skip in the first iterated epoch; `len` and the batch numbers that seed the augmentation
            still count them.

    Yields:
        images (B, C, H, W) float32 normalised, labels (B,) or (B, K) int64, indices (B,) int64 into the data
        set.

    Raises:
        ValueError: if shapes or devices of the tensors do not match, or there are too few images for one batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
    ) -> None:
        _check(images, labels, mean, std, augmentation)
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.seed = seed
        self.start_batch = start_batch
        # Lightning calls `sampler.set_epoch` of the loader, and expects a batch sampler beside the sampler.
        self.batch_sampler = None
        self.sampler = EpochSampler(
            len(images), seed=seed, shuffle=shuffle, rank=rank, world_size=world_size, start=start_batch * batch_size
        )
        self.drop_last = drops_last(len(self.sampler), batch_size, train=shuffle, drop_last=drop_last)
        self._mean = torch.tensor(list(mean), device=images.device)[:, None, None]
        self._std = torch.tensor(list(std), device=images.device)[:, None, None]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (counted from 0) that the next iteration runs."""
        self.sampler.set_epoch(epoch)

    @property
    def digest(self) -> str:
        """A digest of the labels."""
        return digest_of(self.labels)

    @property
    def image_digest(self) -> str:
        """A digest of the images; computed at each call."""
        return digest_of(self.images)

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        samples = len(self.sampler)
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batches of the current epoch; epoch and start are read at the first batch."""
        epoch, first = self.sampler.view, self.sampler.skipped() // self.batch_size
        order = self.sampler.order().to(self.images.device)
        generator = torch.Generator(self.images.device)
        for batch in range(first, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images = self.images[indices]
            if self.augmentation is None:
                images = normalise(to_float(images), self._mean, self._std)
            else:
                generator.manual_seed(mix_seed(self.seed, epoch, batch, self.sampler.rank))
                images = augment(images, self.augmentation, self._mean, self._std, generator)
            yield images, self.labels[indices], indices


def _check(
    images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float], augmentation: Augmentation | None
) -> None:
    if images.ndim != 4 or labels.shape[:1] != images.shape[:1] or labels.ndim not in (1, 2):
        raise ValueError(
            f"images {tuple(images.shape)} and labels {tuple(labels.shape)} do not fit: give (N, C, H, W) and (N,)."
        )
    if labels.dtype != torch.int64 or labels.device != images.device:
        raise ValueError(
            f"labels are {labels.dtype} on {labels.device}: give torch.int64 on the images' device, {images.device}."
        )
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"{len(mean)} mean and {len(std)} std values for images of {images.shape[1]} channel(s): give one each."
        )
    if not all(value > 0 for value in std):
        raise ValueError(f"std {tuple(std)} holds a value that cannot divide: give positive ones.")
    if images.dtype == torch.uint8:
        check_statistics(mean, std, images.shape[1])
    recolors = augmentation is not None and (augmentation.rand_augment or augmentation.color_jitter)
    if recolors and images.dtype != torch.uint8:
        raise ValueError(
            f"images are {images.dtype}, but RandAugment and colour jitter work on uint8: "
            "store the images as uint8 or set rand_augment and color_jitter to 0."
        )
