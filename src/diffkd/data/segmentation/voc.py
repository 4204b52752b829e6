"""PASCAL VOC: 1,464 training and 1,449 evaluation images (2012) in 20 classes and background."""

from pathlib import Path
from typing import Literal

from diffkd.data.image_data import ImageData
from diffkd.data.segmentation.dataset import SCALE_AND_FLIP, PairLoaders
from diffkd.data.segmentation.masks import MaskCode
from diffkd.data.segmentation.pairs import Pairs, check_pairs, refuse
from diffkd.data.segmentation.transform import SegmentationAugmentation
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD

_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dining table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv/monitor",
)


class VocSegmentation(ImageData):
    """Serve the segmentation part of PASCAL VOC (Everingham et al., 2010), as its archive unpacks.

    Images, masks and batches are as in `MaskFolder`; `ignore_index` is 255.

    Args:
        root: folder that holds `JPEGImages`, or `VOCdevkit/VOC2012` or `VOC2012` with it.
        batch_size: training images per batch and process.
        augmentation: what is done to training images besides the random crop.
        seed: seed of order and augmentation.
        train: list of the images that are trained on: `ImageSets/Segmentation/<train>.txt`, such as "train", or
            "train_aug" with the masks of SBD.
        val: list of those that are evaluated.
        masks: folder of the masks, such as "SegmentationClassAug".
        crop_size: (H, W) of training images in pixels; None takes `resize`, or else (512, 512).
        resize: (H, W) that all images are brought to first, at evaluation too; None leaves them.
        full_size_masks: at evaluation leave masks at their own size while images are resized.
        val_batch_size: evaluation images per batch and process at most; None takes `batch_size` where images are
            resized, and 1 otherwise.
        cache: "memory" keeps the decoded and resized pairs in the memory of each process.
        num_workers: worker processes; None takes none with the cache, and otherwise one per core, at most 8.
        verify: read every image and mask now, and list those that cannot be used.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].

    Raises:
        FileNotFoundError: if a folder or list is missing.
        ValueError: if a pair of files cannot be used, as in `MaskFolder`, or a value is out of range.
    """

    task = "segmentation"
    ignore_index = 255

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 8,
        augmentation: SegmentationAugmentation = SCALE_AND_FLIP,
        seed: int = 0,
        train: str = "train",
        val: str = "val",
        masks: str = "SegmentationClass",
        crop_size: tuple[int, int] | None = None,
        resize: tuple[int, int] | None = None,
        full_size_masks: bool = False,
        val_batch_size: int | None = None,
        cache: Literal["none", "memory"] = "none",
        num_workers: int | None = None,
        verify: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        top = Path(root)
        choices = (top, top / "VOCdevkit" / "VOC2012", top / "VOC2012")
        top = next((path for path in choices if (path / "JPEGImages").is_dir()), top)
        code = MaskCode(len(_CLASSES), self.ignore_index)
        pairs = [_listed(top, split, masks) for split in (train, val)]
        loaders = PairLoaders(
            pairs[0],
            pairs[1],
            code,
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            crop_size=crop_size,
            resize=resize,
            full_size_masks=full_size_masks,
            val_batch_size=val_batch_size,
            cache=cache,
            num_workers=num_workers,
            verify=verify,
            mean=mean,
            std=std,
        )
        super().__init__(loaders.splits, _CLASSES, image_size=loaders.crop_size, mean=mean, std=std)
        self.root, self.train, self.val, self.masks = root, train, val, masks
        self.batch_size, self.val_batch_size = batch_size, loaders.val_batch_size
        self.augmentation, self.seed = augmentation, seed
        self.resize, self.crop_size = loaders.resize, loaders.crop_size
        self.full_size_masks, self.cache, self.verify = full_size_masks, cache, verify
        self.num_workers = loaders.num_workers


def _listed(root: Path, split: str, masks: str) -> Pairs:
    """Pair the images and masks that a list names, a name without extension a line."""
    source = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such list; give a root with JPEGImages, {masks} and ImageSets.")
    names = [line.strip() for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{source}: lists no images; give one name a line.")
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"{source}: {twice!r} is listed twice; remove one.")
    real = root.resolve()
    pairs = [(root / "JPEGImages" / f"{name}.jpg", root / masks / f"{name}.png") for name in names]
    for path in (path for pair in pairs for path in pair):
        if not path.resolve().is_relative_to(real):
            raise ValueError(f"{source}: {path.stem!r} leads to {path.resolve()}, outside of {root}; remove it.")
    missing = [str(path) for pair in pairs for path in pair if not path.is_file()]
    refuse(missing, f"{source}: {len(missing)} of the files it names are missing; add them or remove their names")
    return check_pairs(root, pairs)
