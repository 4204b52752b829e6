"""What all data modules here have in common: loaders over their splits, and the facts that models are built after."""

from collections.abc import Sequence
from typing import Any, Protocol

from lightning.pytorch import LightningDataModule, Trainer

from diffkd.data.device_loader import DeviceLoader
from diffkd.data.folder_loader import FolderLoader

Loader = DeviceLoader | FolderLoader


class Loaders(Protocol):
    """Makes loaders over the splits of one data set, with batches where the trainer wants them."""

    def train_loader(self, trainer: Trainer | None, start_batch: int = 0) -> Loader:
        """Return shuffled, augmented training batches; the first epoch begins at `start_batch`."""

    def val_loader(self, trainer: Trainer | None) -> Loader:
        """Return the batches of the evaluation images, in order, each image exactly once over all ranks."""

    def test_loader(self, trainer: Trainer | None) -> Loader:
        """Return the batches of the test images, likewise."""

    def example(self) -> Any:
        """Return two training images as models see them, on the CPU."""


class ImageData(LightningDataModule):
    """Serve images by loaders that something else makes, and say what models must know of them.

    Args:
        loaders: makes the loaders.
        classes: names of the K classes.
        image_size: (H, W) in pixels.
        mean: per channel, of the normalisation, in units of [0, 1]; the default leaves pixels as they are, for
            detectors, which normalise by themselves.
        std: likewise.

    Attributes:
        start_batch: batches that the first epoch of training skips, set where a run goes on in mid-epoch.
    """

    def __init__(
        self,
        loaders: Loaders,
        classes: Sequence[str],
        *,
        image_size: tuple[int, int],
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self._loaders = loaders
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)
        self.in_channels = len(mean)
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.start_batch = 0

    def train_dataloader(self) -> Loader:
        """Return shuffled, augmented training batches; the first epoch begins at `start_batch`."""
        return self._loaders.train_loader(self.trainer, self.start_batch)

    def val_dataloader(self) -> Loader:
        """Return the batches of the evaluation images, each image exactly once."""
        return self._loaders.val_loader(self.trainer)

    def test_dataloader(self) -> Loader:
        """Return the batches of the test images, or without these of the evaluation images, each exactly once."""
        return self._loaders.test_loader(self.trainer)

    def example(self) -> Any:
        """Return two training images on the CPU: (2, C, H, W) float32, normalised.

        For detection a list of two (3, H, W) float32 in [0, 1], each of its own size.
        """
        return self._loaders.example()
