"""ADE20K's scene parsing benchmark: 20,210 training and 2,000 evaluation images, 150 classes."""

from pathlib import Path
from typing import Any

from diffkd.data.folders import read_text
from diffkd.data.segmentation.masks import MaskCode
from diffkd.data.segmentation.pairs import Pairs, scan_pairs
from diffkd.data.segmentation.segmentation_data import SCALE_AND_FLIP, SegmentationData, Split
from diffkd.data.segmentation.transform import SegmentationAugmentation

_CLASSES = 150


class Ade20k(SegmentationData):
    """Serve the scene parsing benchmark of ADE20K (Zhou et al., 2017), as unpacked from ADEChallengeData2016.

    Stored ids 1 to 150 become classes 0 to 149; id 0 (everything else) is ignored. Names are read from
    `objectInfo150.txt` in the root if present; otherwise class 3 is named "class 3".

    Images, masks and batches are as in `MaskFolder`; `ignore_index` is 255.

    Args:
        root: folder that holds `images` and `annotations`, or `ADEChallengeData2016`.
        batch_size: training images per batch and process.
        augmentation: augmentation of training images besides the random crop.
        seed: seed of order and augmentation.
        train: the training split.
        val: the evaluation split.
        **options: the other arguments of `SegmentationData`, such as `resize` and `num_workers`.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 8,
        augmentation: SegmentationAugmentation = SCALE_AND_FLIP,
        seed: int = 0,
        train: str = "training",
        val: str = "validation",
        **options: Any,
    ) -> None:
        top = Path(root)
        top = next((path for path in (top, top / "ADEChallengeData2016") if (path / "images").is_dir()), top)
        classes = _names(top / "objectInfo150.txt")
        id_map = {0: self.ignore_index} | {stored: stored - 1 for stored in range(1, _CLASSES + 1)}
        code = MaskCode(_CLASSES, self.ignore_index, id_map=id_map, unmapped="error")
        names = {"train": train, "val": val}

        def read(split: Split, skip_bad: bool) -> Pairs:
            return scan_pairs(top, f"images/{names[split]}", f"annotations/{names[split]}", skip_bad=skip_bad)

        super().__init__(read, code, classes, batch_size=batch_size, augmentation=augmentation, seed=seed, **options)
        self.root, self.train, self.val = root, train, val


def _names(path: Path) -> tuple[str, ...]:
    """Read the names: a line per class, separated by tabs, with the id (from 1) first and the name last."""
    if not path.is_file():
        return tuple(f"class {index}" for index in range(_CLASSES))
    rows = [line.strip().split("\t") for line in read_text(path).splitlines()]
    names = {row[0].strip(): row[-1].strip() for row in rows if len(row) > 1}
    missing = [index for index in range(1, _CLASSES + 1) if not names.get(str(index))]
    if missing:
        raise ValueError(f"{path}: no name for class {missing[0]}; take the file of the archive, or remove it.")
    return tuple(names[str(index)] for index in range(1, _CLASSES + 1))
