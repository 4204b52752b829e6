"""PASCAL VOC: 1,464 training and 1,449 evaluation images (2012) in 20 classes and background."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from diffkd.data.folders import EXTENSIONS, is_file, leads_outside, read_text
from diffkd.data.segmentation.mask_folder import Color, class_colors, class_names, ids_and_colors
from diffkd.data.segmentation.masks import MaskCode, mask_header
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
    """Serve the segmentation part of PASCAL VOC (Everingham et al., 2010), as unpacked from its archive.

    Images, masks and batches are as in `MaskFolder`; `ignore_index` is 255. If the masks are in colours, as CVAT writes
    them, `labelmap.txt` in the root names the classes and their colours; the colour of PASCAL VOC's borders is ignored.

    Args:
        root: folder that holds `JPEGImages`, or `VOCdevkit/VOC2012` or `VOC2012` with it.
        batch_size: training images per batch and process.
        augmentation: augmentation of training images besides the random crop.
        seed: seed of order and augmentation.
        train: list of the training images: `ImageSets/Segmentation/<train>.txt`, such as "train", or "train_aug" with
            the masks of SBD.
        val: list of the evaluation images.
        masks: folder of the masks, such as "SegmentationClassAug".
        classes: names of other classes in the order of their ids, or a text file with one name per line, searched in
            `root` first; None uses those of `labelmap.txt` for masks in colours, otherwise those of PASCAL VOC.
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
        classes: str | Path | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        top = Path(root)
        choices = (top, top / "VOCdevkit" / "VOC2012", top / "VOC2012")
        top = next((path for path in choices if (path / "JPEGImages").is_dir()), top)
        table = _table_of_colors(top, Path(root), masks)
        learned = _CLASSES if table is None else tuple(name for name, color in table.items() if color != _BORDER)
        names = learned if classes is None else class_names(classes, Path(root))
        coded = None if table is None else ids_and_colors(table, names, self.ignore_index)
        code = MaskCode(len(names), self.ignore_index, colors=coded)
        lists = {"train": train, "val": val}

        def read(split: Split, skip_bad: bool) -> Pairs:
            pairs = _listed(top, lists[split], masks, code.holds_colors, skip_bad)
            if split == "train" and classes is None and table is None:
                _warn_about_custom_classes(pairs, code)
            return pairs

        super().__init__(read, code, names, batch_size=batch_size, augmentation=augmentation, seed=seed, **options)
        self.root, self.train, self.val, self.masks = root, train, val, masks
        # The argument may be None or a file; the attribute holds the names.
        self.save_hyperparameters({"classes": classes}, logger=False)


_BORDER: Color = (224, 224, 192)  # of objects, id 255 in the palette of PASCAL VOC


def _table_of_colors(top: Path, root: Path, masks: str) -> dict[str, Color] | None:
    """Return the colours in `labelmap.txt` of a root whose masks hold colours and no ids, as the first one tells."""
    folder = next((one for one in dict.fromkeys((root, top)) if (one / "labelmap.txt").is_file()), None)
    if folder is None or not (top / masks).is_dir():
        return None
    names = sorted(os.listdir(top / masks))  # noqa: PTH208 - names are all that is wanted
    first = next((top / masks / name for name in names if not name.startswith(".") and is_file(top / masks / name)), "")
    if _is_mask(first, colours=False) or not _is_mask(first, colours=True):
        return None
    table = class_colors("labelmap.txt", folder)
    return table if _BORDER in table.values() else table | {"": _BORDER}


def _is_mask(file: str | Path, *, colours: bool) -> bool:
    try:
        mask_header(file, colours=colours)
    except ValueError:
        return False
    return True


_LOOKED_AT = 64


def _warn_about_custom_classes(pairs: Pairs, code: MaskCode) -> None:
    """Warn if the masks contain only the first few ids, as with custom classes in PASCAL VOC's folder layout."""
    seen: set[int] = set()
    for mask in pairs.masks[:: len(pairs.masks) // _LOOKED_AT + 1]:
        try:
            seen |= set(np.unique(code.read(mask)).tolist())
        except ValueError:
            return  # reported when the pair is read
    seen -= {code.ignore_index}
    if seen and max(seen) < len(_CLASSES) // 2 and seen == set(range(max(seen) + 1)):
        named = ", ".join(_CLASSES[: max(seen) + 1])
        rank_zero_warn(
            f"the training masks seem to hold ids 0 to {max(seen)} only, which are taken for {named} of the "
            f"{len(_CLASSES)} classes of PASCAL VOC; name your own with classes=..., or use MaskFolder."
        )


def _listed(root: Path, split: str, masks: str, colors: bool, skip_bad: bool) -> Pairs:
    """Pair the images and masks of a list, with one name per line or, as in the lists of SBD, the paths of both."""
    source = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such list; give a root with JPEGImages, {masks} and ImageSets.")
    names = [line.strip() for line in read_text(source).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{source}: lists no images; give one name a line.")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{source}: {twice!r} is listed twice; remove one.")
    real = root.resolve()
    pairs = [_pair(root, name, masks) for name in names]
    for path in (path for pair in pairs for path in pair):
        if leads_outside(path, real, named=path.relative_to(root) if path.is_relative_to(root) else path):
            raise ValueError(f"{source}: {path.stem!r} leads to {path.resolve()}, outside of {root}; remove it.")
    if not skip_bad:  # otherwise the later check leaves them out
        missing = [str(path) for pair in pairs for path in pair if not is_file(path)]
        refuse(missing, f"{source}: {len(missing)} of the files it names are missing; add them or remove their names")
    return check_pairs(root, pairs, colors=colors, skip_bad=skip_bad)


def _pair(root: Path, name: str, masks: str) -> tuple[Path, Path]:
    """Return the image and the mask named in a line."""
    parts = name.split()
    if len(parts) == 2 and all("/" in part for part in parts):
        image, mask = (root / part.lstrip("/") for part in parts)
        return image, mask
    stem, dot, extension = name.rpartition(".")
    name = stem if stem and f"{dot}{extension}".lower() in EXTENSIONS else name
    return _found(root / "JPEGImages", name, ".jpg"), _found(root / masks, name, ".png")


def _found(folder: Path, name: str, usual: str) -> Path:
    """Return the file of a name with any extension; if none exists, the path with the default extension."""
    extensions = (usual, usual.upper(), *sorted(EXTENSIONS), *map(str.upper, sorted(EXTENSIONS)))
    paths = (folder / f"{name}{extension}" for extension in extensions)
    return next((path for path in paths if is_file(path)), folder / f"{name}{usual}")
