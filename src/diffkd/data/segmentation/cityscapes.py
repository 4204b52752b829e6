"""Cityscapes: 2,975 training and 500 evaluation images of streets, 2048x1024, in 19 classes."""

from pathlib import Path
from typing import Any, Literal

from diffkd.data.segmentation.masks import MaskCode
from diffkd.data.segmentation.pairs import Pairs, scan_pairs
from diffkd.data.segmentation.segmentation_data import SCALE_AND_FLIP, SegmentationData, Split
from diffkd.data.segmentation.transform import SegmentationAugmentation

# Name of each evaluated class, in the order of train ids, and its id in *_labelIds.png.
_CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}


class Cityscapes(SegmentationData):
    """Serve Cityscapes (Cordts et al., 2016), as unpacked from its archives leftImg8bit and gtFine.

    Images, masks and batches are as in `MaskFolder`; `ignore_index` is 255.

    Args:
        root: folder that holds `leftImg8bit` and `gtFine`.
        batch_size: training images per batch and process.
        augmentation: augmentation of training images besides the random crop.
        seed: seed of order and augmentation.
        labels: which masks to read: "labelIds", from the archive, whose 34 ids are mapped to the 19 train ids;
            "labelTrainIds", made by the official scripts; "auto" uses labelIds if there are any.
        train: the training split.
        val: the evaluation split.
        crop_size: (H, W) of training images in pixels; None uses `resize`, or else (512, 512).
        **options: the other arguments of `SegmentationData`, such as `resize` and `num_workers`.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 8,
        augmentation: SegmentationAugmentation = SCALE_AND_FLIP,
        seed: int = 0,
        labels: Literal["auto", "labelIds", "labelTrainIds"] = "auto",
        train: str = "train",
        val: str = "val",
        crop_size: tuple[int, int] | None = (512, 1024),
        **options: Any,
    ) -> None:
        top = Path(root)
        if labels not in ("auto", "labelIds", "labelTrainIds"):
            raise ValueError(f"labels={labels!r}: give 'auto', 'labelIds' or 'labelTrainIds'.")
        if labels == "auto":
            own = next((top / "gtFine" / train).glob("*/[!.]*_gtFine_labelIds.png"), None)
            made = next((top / "gtFine" / train).glob("*/[!.]*_gtFine_labelTrainIds.png"), None)
            labels = "labelTrainIds" if made and not own else "labelIds"
        id_map = {stored: id_ for id_, stored in enumerate(_CLASSES.values())} if labels == "labelIds" else None
        code = MaskCode(len(_CLASSES), self.ignore_index, id_map=id_map)
        splits = {"train": train, "val": val}

        def read(split: Split, skip_bad: bool) -> Pairs:
            return scan_pairs(
                top,
                f"leftImg8bit/{splits[split]}",
                f"gtFine/{splits[split]}",
                image_suffix="_leftImg8bit",
                mask_suffix=f"_gtFine_{labels}",
                skip_bad=skip_bad,
            )

        super().__init__(
            read,
            code,
            tuple(_CLASSES),
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            crop_size=crop_size,
            **options,
        )
        self.root, self.labels, self.train, self.val = root, labels, train, val
