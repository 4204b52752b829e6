"""The part that all data modules with pixels in memory share: two sets, and the loaders over them."""

from collections.abc import Sequence

from lightning.pytorch import Trainer
from torch import Tensor

from diffkd.data.augmentation import Augmentation
from diffkd.data.device_loader import DeviceLoader
from diffkd.data.image_set import ImageSet
from diffkd.data.placement import placement
from diffkd.data.statistics import channel_statistics


class InMemory:
    """Keep a training and an evaluation set on the trainer's device and make loaders over them.

    Args:
        train: training images and labels.
        val: evaluation images and labels.
        batch_size: images per batch and process, at training and evaluation.
        augmentation: what is done to training images.
        seed: seed of order and augmentation.
        mean: one value per channel; None computes it from the training set.
        std: one value per channel; None computes it from the training set.
    """

    def __init__(
        self,
        train: ImageSet,
        val: ImageSet,
        *,
        batch_size: int,
        augmentation: Augmentation,
        seed: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.seed = seed
        computed_mean, computed_std = (mean, std) if mean and std else channel_statistics(train.images)
        self.mean = tuple(mean or computed_mean)
        self.std = tuple(std or computed_std)

    def train_loader(self, trainer: Trainer | None, start_batch: int = 0) -> DeviceLoader:
        """Return shuffled, augmented batches of the training set; the first epoch begins at `start_batch`."""
        place = placement(trainer)
        self.train = self.train.to(place.device)
        return DeviceLoader(
            *self.train,
            batch_size=self.batch_size,
            mean=self.mean,
            std=self.std,
            augmentation=self.augmentation,
            seed=self.seed,
            shuffle=True,
            rank=place.rank,
            world_size=place.world_size,
            start_batch=start_batch,
        )

    def val_loader(self, trainer: Trainer | None) -> DeviceLoader:
        """Return the batches of the evaluation set, in order, every image exactly once over all ranks."""
        place = placement(trainer)
        self.val = self.val.to(place.device)
        return DeviceLoader(
            *self.val,
            batch_size=self.batch_size,
            mean=self.mean,
            std=self.std,
            rank=place.rank,
            world_size=place.world_size,
        )

    def test_loader(self, trainer: Trainer | None) -> DeviceLoader:
        """Return the same as `val_loader`."""
        return self.val_loader(trainer)

    def example(self) -> Tensor:
        """Return two normalised training images, (2, C, H, W) float32 on the CPU, for probing models."""
        two = ImageSet(self.train.images[[0, -1]], self.train.labels[[0, -1]]).to(placement(None).device)
        images, _, _ = next(iter(DeviceLoader(*two, batch_size=2, mean=self.mean, std=self.std)))
        return images
