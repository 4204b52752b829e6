"""PASCAL VOC: 1,464 training and 1,449 evaluation images (2012) in 20 classes and background."""

from pathlib import Path
from typing import Any

from diffkd.data.segmentation.masks import MaskCode
from diffkd.data.segmentation.pairs import Pairs, check_pairs, refuse
from diffkd.data.segmentation.segmentation_data import SCALE_AND_FLIP, SegmentationData, Split
from diffkd.data.segmentation.transform import SegmentationAugmentation

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


class VocSegmentation(SegmentationData):
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
        **options: the other arguments of `SegmentationData`, such as `resize` and `num_workers`.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 8,
        augmentation: SegmentationAugmentation = SCALE_AND_FLIP,
        seed: int = 0,
        train: str = "train",
        val: str = "val",
        masks: str = "SegmentationClass",
        **options: Any,
    ) -> None:
        top = Path(root)
        choices = (top, top / "VOCdevkit" / "VOC2012", top / "VOC2012")
        top = next((path for path in choices if (path / "JPEGImages").is_dir()), top)
        code = MaskCode(len(_CLASSES), self.ignore_index)
        lists = {"train": train, "val": val}

        def read(split: Split) -> Pairs:
            return _listed(top, lists[split], masks)

        super().__init__(read, code, _CLASSES, batch_size=batch_size, augmentation=augmentation, seed=seed, **options)
        self.root, self.train, self.val, self.masks = root, train, val, masks


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
