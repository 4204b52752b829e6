"""Generated scenes for semantic segmentation, in memory, with exact masks; no download."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffkd.data.image_data import ImageData
from diffkd.data.loaders import SplitLoaders
from diffkd.data.scenes.composition import SceneOptions, Split, make_scenes
from diffkd.data.seeding import mix_seed
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD

BACKGROUND = "background"


class SegmentationScenes(ImageData):
    """Serve scenes of garments on clutter (`diffkd.data.scenes.composition`), with the class of every pixel.

    Class 0 is the background, followed by the garments. Scenes are generated when the module is created, about 2 ms
    each. Training and evaluation scenes share no garment.

    Args:
        train_count: number of training scenes.
        val_count: number of evaluation scenes.
        size: (H, W) of the scenes, in pixels.
        classes: garment classes, as names or numbers (0 to 9) of Fashion-MNIST; None uses all ten.
        batch_size: images per batch and process.
        seed: seed of scenes, order and augmentation.
        flip: mirror training scenes left to right with probability 1/2.
        min_objects: smallest number of objects drawn in a scene.
        max_objects: largest number of objects drawn; see `SceneOptions`.
        min_scale: smallest side of an object's square, as a fraction of the scene's shorter side.
        max_scale: largest side, likewise.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].

    Raises:
        ValueError: if a value is out of its range, or there is no such class.
    """

    task = "segmentation"
    ignore_index = 255  # no pixel of a scene has it

    def __init__(
        self,
        train_count: int = 400,
        val_count: int = 100,
        size: tuple[int, int] = (128, 128),
        classes: tuple[str | int, ...] | None = None,
        batch_size: int = 16,
        seed: int = 0,
        flip: bool = True,
        min_objects: int = 1,
        max_objects: int = 6,
        min_scale: float = 0.1,
        max_scale: float = 0.9,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        if classes is not None:
            # The names in `self.classes` are also valid arguments.
            classes = tuple(one for one in classes if one != BACKGROUND)
        options = SceneOptions(size, classes, min_objects, max_objects, min_scale, max_scale)

        def scenes(split: Split, count: int, flip: bool) -> MaskedImages:
            made = make_scenes(seed, split, count, options)
            images, masks = zip(*((scene.image, scene.class_mask) for scene in made), strict=True)
            return MaskedImages(torch.stack(images), torch.stack(masks), mean, std, flip=flip, seed=seed)

        train, val = scenes("train", train_count, flip), scenes("val", val_count, False)
        loaders = SplitLoaders(train, val, train.example, batch_size=batch_size, seed=seed)
        names = (BACKGROUND, *options.class_names())
        super().__init__(loaders, names, image_size=options.size, mean=mean, std=std)
        self.train_count, self.val_count, self.size = train_count, val_count, options.size
        self.batch_size, self.seed, self.flip = batch_size, seed, flip
        self.min_objects, self.max_objects = min_objects, max_objects
        self.min_scale, self.max_scale = min_scale, max_scale


class MaskedImages(Dataset[tuple[Tensor, Tensor, int]]):
    """Return (image, mask, index) of images in memory for the key (epoch, index) of `EpochSampler`.

    Args:
        images: (N, 3, H, W) uint8.
        masks: (N, H, W) uint8.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].
        flip: mirror with probability 1/2; the draw is a function of (seed, epoch, index).
        seed: seed of the flips.
    """

    def __init__(
        self, images: Tensor, masks: Tensor, mean: tuple[float, ...], std: tuple[float, ...], *, flip: bool, seed: int
    ) -> None:
        self.images = images
        self.masks = masks
        self.flip = flip
        self.seed = seed
        self._mean, self._std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """Return the image (3, H, W) float32 normalised, its mask (H, W) int64 and its index."""
        epoch, index = key
        image, mask = self.images[index], self.masks[index]
        # The highest of the seed's 63 bits.
        if self.flip and mix_seed(self.seed, epoch, index) >> 62:
            image, mask = image.flip(-1), mask.flip(-1)
        return self._normalised(image), mask.long(), index

    def example(self) -> Tensor:
        """Return the first and the last image, (2, 3, H, W) float32 normalised."""
        return self._normalised(self.images[[0, -1]])

    def _normalised(self, images: Tensor) -> Tensor:
        """Return (..., 3, H, W) uint8 as normalised float32."""
        return (images.to(torch.float32) / 255 - self._mean) / self._std
