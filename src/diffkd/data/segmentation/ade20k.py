"""ADE20K's scene parsing benchmark: 20,210 training and 2,000 evaluation images in 150 classes."""

from pathlib import Path
from typing import Literal

from diffkd.data.image_data import ImageData
from diffkd.data.segmentation.dataset import SCALE_AND_FLIP, PairLoaders
from diffkd.data.segmentation.masks import MaskCode
from diffkd.data.segmentation.pairs import scan_pairs
from diffkd.data.segmentation.transform import SegmentationAugmentation
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD

_CLASSES = 150


class Ade20k(ImageData):
    """Serve the scene parsing benchmark of ADE20K (Zhou et al., 2017), as ADEChallengeData2016 unpacks.

    Stored ids 1 to 150 become classes 0 to 149, and the stored 0, which is everything else, is ignored. Names come from
    `objectInfo150.txt` if that lies in the root; otherwise class 3 is called "class 3".

    Images, masks and batches are as in `MaskFolder`; `ignore_index` is 255.

    Args:
        root: folder that holds `images` and `annotations`, or `ADEChallengeData2016`.
        batch_size: training images per batch and process.
        augmentation: what is done to training images besides the random crop.
        seed: seed of order and augmentation.
        train: the split that is trained on.
        val: the split that is evaluated.
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
        train: str = "training",
        val: str = "validation",
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
        top = next((path for path in (top, top / "ADEChallengeData2016") if (path / "images").is_dir()), top)
        classes = _names(top / "objectInfo150.txt")
        id_map = {0: self.ignore_index} | {stored: stored - 1 for stored in range(1, _CLASSES + 1)}
        code = MaskCode(_CLASSES, self.ignore_index, id_map=id_map, unmapped="error")
        pairs = [scan_pairs(top, f"images/{split}", f"annotations/{split}") for split in (train, val)]
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
        super().__init__(loaders.splits, classes, image_size=loaders.crop_size, mean=mean, std=std)
        self.root, self.train, self.val = root, train, val
        self.batch_size, self.val_batch_size = batch_size, loaders.val_batch_size
        self.augmentation, self.seed = augmentation, seed
        self.resize, self.crop_size = loaders.resize, loaders.crop_size
        self.full_size_masks, self.cache, self.verify = full_size_masks, cache, verify
        self.num_workers = loaders.num_workers


def _names(path: Path) -> tuple[str, ...]:
    """Read the names: a line per class, its id from 1 on first and its name last, apart by tabs."""
    if not path.is_file():
        return tuple(f"class {index}" for index in range(_CLASSES))
    rows = [line.strip().split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    names = {row[0].strip(): row[-1].strip() for row in rows if len(row) > 1}
    missing = [index for index in range(1, _CLASSES + 1) if not names.get(str(index))]
    if missing:
        raise ValueError(f"{path}: no name for class {missing[0]}; take the file of the archive, or remove it.")
    return tuple(names[str(index)] for index in range(1, _CLASSES + 1))
