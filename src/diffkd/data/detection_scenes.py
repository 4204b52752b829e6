"""Generated scenes for object detection, in memory: nothing to download, every box exact."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from diffkd.data.box_augmentation import BoxAugmentation
from diffkd.data.boxes import Annotations, ImageBoxes, gather
from diffkd.data.detection_dataset import DetectionDataset, collate_detection
from diffkd.data.folder_loader import FolderLoader
from diffkd.data.placement import placement
from diffkd.data.scenes import Scene, SceneOptions, Split, make_scenes


class DetectionScenes(LightningDataModule):
    """Serve scenes of garments before clutter (`diffkd.data.scenes`), with boxes tight around what is visible.

    Scenes are made when the module is, about 2 ms each. Training and evaluation scenes share no garment.

    Args:
        train_count: number of training scenes.
        val_count: number of evaluation scenes.
        size: (H, W) of the scenes, in pixels. From 192 on, objects are small, medium and large in the sense of COCO.
        classes: which garments occur, as names or numbers (0 to 9) of Fashion-MNIST; None takes all ten.
        batch_size: images per batch and process.
        seed: seed of scenes, order and augmentation.
        flip: mirror training scenes left to right with probability 1/2.
        min_objects: fewest objects drawn in a scene.
        max_objects: most objects drawn; see `SceneOptions`.
        min_size: shorter side at which a detector is to work, in pixels; None takes that of the scenes. This and
            `max_size` are for whoever builds the detector.
        max_size: limit of its longer side; None takes that of the scenes.

    Raises:
        ValueError: if a value is out of its range, or there is no such class.
    """

    task = "detection"

    def __init__(
        self,
        train_count: int = 400,
        val_count: int = 100,
        size: tuple[int, int] = (192, 192),
        classes: tuple[str | int, ...] | None = None,
        batch_size: int = 8,
        seed: int = 0,
        flip: bool = True,
        min_objects: int = 1,
        max_objects: int = 6,
        min_size: int | tuple[int, ...] | None = None,
        max_size: int | None = None,
    ) -> None:
        super().__init__()
        self.options = SceneOptions(size, classes, min_objects, max_objects)
        self.train_count, self.val_count = train_count, val_count
        self.size = self.image_size = self.options.size
        self.classes = self.options.class_names()
        self.num_classes = len(self.classes)
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.min_objects, self.max_objects = min_objects, max_objects
        self.min_size = min(self.size) if min_size is None else min_size
        self.max_size = max(self.size) if max_size is None else max_size
        self.in_channels = 3
        # Detectors normalise by themselves; these leave pixels in [0, 1] as they are.
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.start_batch = 0
        self._train = self._scenes("train", train_count, BoxAugmentation(flip=flip))
        self._val = self._scenes("val", val_count, None)

    def train_dataloader(self) -> FolderLoader:
        """Return shuffled, augmented training batches; the first epoch begins at `start_batch`."""
        return self._loader(self._train, train=True)

    def val_dataloader(self) -> FolderLoader:
        """Return the batches of the evaluation scenes, each scene exactly once."""
        return self._loader(self._val, train=False)

    def test_dataloader(self) -> FolderLoader:
        """Return the same as `val_dataloader`."""
        return self.val_dataloader()

    def example(self) -> list[Tensor]:
        """Return two training images, (3, H, W) float32 in [0, 1] on the CPU."""
        return [self._train.read(index).float() / 255 for index in (0, len(self._train) - 1)]

    def _scenes(self, split: Split, count: int, augmentation: BoxAugmentation | None) -> DetectionDataset:
        images, boxes = [], []
        for scene in make_scenes(self.seed, split, count, self.options):
            images.append(scene.image)
            boxes.append(_boxes(scene))
        annotations: Annotations = gather(range(count), boxes)
        return DetectionDataset(annotations, torch.stack(images).__getitem__, augmentation, self.seed)

    def _loader(self, dataset: DetectionDataset, *, train: bool) -> FolderLoader:
        place = placement(self.trainer)
        return FolderLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=train,
            seed=self.seed,
            drop_last=False,
            pin_memory=place.device.type == "cuda",
            rank=place.rank,
            world_size=place.world_size,
            start_batch=self.start_batch if train else 0,
            collate=collate_detection,
        )


def _boxes(scene: Scene) -> ImageBoxes:
    area = scene.instances.flatten(1).sum(dim=1).to(torch.float32)
    return ImageBoxes(scene.boxes, scene.labels, area, torch.zeros_like(scene.labels))
