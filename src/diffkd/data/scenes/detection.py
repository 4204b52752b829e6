"""Generated scenes for object detection, in memory, with exact boxes; no download."""

import torch

from diffkd.data.detection.annotated_files import ImageBoxes, gather
from diffkd.data.detection.augmentation import BoxAugmentation
from diffkd.data.detection.dataset import DetectionDataset, collate_detection
from diffkd.data.image_data import ImageData
from diffkd.data.loaders import SplitLoaders
from diffkd.data.scenes.composition import Scene, SceneOptions, Split, make_scenes


class DetectionScenes(ImageData):
    """Serve scenes of garments on clutter (`diffkd.data.scenes.composition`), with boxes tight around the visible
    pixels.

    Scenes are generated when the module is created, about 2 ms each. Training and evaluation scenes share no garment.

    Args:
        train_count: number of training scenes.
        val_count: number of evaluation scenes.
        size: (H, W) of the scenes, in pixels. From 192 on, objects have COCO's small, medium and large sizes.
        classes: garment classes, as names or numbers (0 to 9) of Fashion-MNIST; None uses all ten.
        batch_size: images per batch and process.
        seed: seed of scenes, order and augmentation.
        flip: mirror training scenes left to right with probability 1/2.
        min_objects: smallest number of objects drawn in a scene.
        max_objects: largest number of objects drawn; see `SceneOptions`.
        min_scale: smallest side of an object's square, as a fraction of the scene's shorter side.
        max_scale: largest side, likewise.
        min_size: shorter side of the detector's input, in pixels; None uses that of the scenes. The detector is built
            with this and `max_size`.
        max_size: limit of the longer side of the detector's input; None uses that of the scenes.

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
        min_scale: float = 0.1,
        max_scale: float = 0.9,
        min_size: int | tuple[int, ...] | None = None,
        max_size: int | None = None,
    ) -> None:
        options = SceneOptions(size, classes, min_objects, max_objects, min_scale, max_scale)
        train = _scenes(seed, "train", train_count, options, BoxAugmentation(flip=flip))
        loaders = SplitLoaders(
            train,
            _scenes(seed, "val", val_count, options, None),
            train.example,
            batch_size=batch_size,
            seed=seed,
            drop_last=False,
            collate=collate_detection,
        )
        super().__init__(loaders, options.class_names(), image_size=options.size)
        self.train_count, self.val_count, self.size = train_count, val_count, options.size
        self.batch_size, self.seed, self.flip = batch_size, seed, flip
        self.min_objects, self.max_objects = min_objects, max_objects
        self.min_scale, self.max_scale = min_scale, max_scale
        self.min_size = min(self.size) if min_size is None else min_size
        self.max_size = max(self.size) if max_size is None else max_size


def _scenes(
    seed: int, split: Split, count: int, options: SceneOptions, augmentation: BoxAugmentation | None
) -> DetectionDataset:
    images, boxes = [], []
    for scene in make_scenes(seed, split, count, options):
        images.append(scene.image)
        boxes.append(_boxes(scene))
    return DetectionDataset(gather(range(count), boxes), torch.stack(images).__getitem__, augmentation, seed)


def _boxes(scene: Scene) -> ImageBoxes:
    area = scene.instances.flatten(1).sum(dim=1).to(torch.float32)
    return ImageBoxes(scene.boxes, scene.labels, area, torch.zeros_like(scene.labels))
