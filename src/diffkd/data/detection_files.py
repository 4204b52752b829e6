"""The part that all data modules of annotated image files share: their splits, and the loaders over them."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from diffkd.data.absent_classes import absent_classes
from diffkd.data.annotated_files import AnnotatedFiles
from diffkd.data.bad_images import OnBadImage, check_on_bad_image
from diffkd.data.box_augmentation import BoxAugmentation
from diffkd.data.decode import MEND, upright_size
from diffkd.data.detection_dataset import DetectionDataset, collate_detection
from diffkd.data.folder_scan import FolderSamples
from diffkd.data.quoting import quoted
from diffkd.data.split_loaders import SplitLoaders
from diffkd.data.verification import check_readable


class DetectionFiles:
    """Check the splits of a detection data set and make loaders over them.

    Args:
        train: images to train on; their crowd boxes are left out.
        val: images to evaluate on; crowd boxes stay, flagged.
        test: images to test on; None takes `val`.
        batch_size: images per batch and process.
        augmentation: what is done to training images and their boxes.
        seed: seed of order and augmentation.
        keep_empty: whether to train on images without boxes, too.
        num_workers: worker processes; None takes one per core, at most 8.
        on_bad_image: "error" or "skip", see `ImageFolder`.
        verify: decode every file before training also for "error".

    Attributes:
        splits: the loaders.
        image_size: (H, W) of the first image.
        skipped: one message per image left out because it is broken.
        dropped: one message per box left out because it has no extent inside its image.

    Raises:
        FileNotFoundError: if an image file is missing.
        ValueError: if no image or no box is left to train on, or a file is broken.
    """

    def __init__(
        self,
        train: AnnotatedFiles,
        val: AnnotatedFiles,
        test: AnnotatedFiles | None,
        *,
        batch_size: int,
        augmentation: BoxAugmentation,
        seed: int,
        keep_empty: bool,
        num_workers: int | None,
        on_bad_image: OnBadImage,
        verify: bool,
    ) -> None:
        check_on_bad_image(on_bad_image)
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.skipped: list[str] = []
        self.dropped: list[str] = []
        self._decodes = verify or on_bad_image == "skip"
        train = _to_train(self._checked(train, on_bad_image), keep_empty)
        val = _to_measure(self._checked(val, on_bad_image))
        height, width = train.sizes[0].tolist()
        self.image_size: tuple[int, int] = (height, width)
        training = DetectionDataset(train.annotations, train.read, augmentation, seed)
        if test is not None:
            test = _to_measure(self._checked(test, on_bad_image))
        self.splits = SplitLoaders(
            training,
            DetectionDataset(val.annotations, val.read),
            training.example,
            batch_size=batch_size,
            seed=seed,
            test=None if test is None else DetectionDataset(test.annotations, test.read),
            num_workers=self.num_workers,
            drop_last=False,
            collate=collate_detection,
        )

    def _checked(self, files: AnnotatedFiles, on_bad_image: OnBadImage) -> AnnotatedFiles:
        """Return the images that can be used; collect and warn of what is left out."""
        if files.dropped:
            rank_zero_warn(f"{len(files.dropped)} box(es) are left out; the first: {files.dropped[0]}")
            self.dropped += files.dropped
        if files.cut:
            rank_zero_warn(
                f"{files.cut} box(es) are cut at the border of their image: if they are many, they may be in another "
                f"format; the first: {files.first_cut}"
            )
        corners = files.annotations.boxes.boxes
        if len(corners) and corners.max() <= 1 and files.sizes.max() > 2:
            raise ValueError(
                f"{files.source}: all boxes lie in the first pixel of their image; write pixels, not shares."
            )
        repeated = [path for path, count in Counter(files.paths).items() if count > 1]
        if repeated:
            rank_zero_warn(
                f"{files.source}: {len(repeated)} image files are there more than once, first {repeated[0]}: "
                "where each time has some of its boxes only, the others pass for background: put them together."
            )
        if not self._decodes:
            _check_present(files)
            return files
        with ThreadPoolExecutor(max(self.num_workers, 1)) as pool:
            problems = list(pool.map(partial(_problem, files), range(len(files.paths)), chunksize=64))
        found = [problem for problem in problems if problem is not None]
        if not found:
            return files
        counted = f"{files.source}: {len(found)} of {len(problems)} images are"
        if on_bad_image == "error":
            raise ValueError(f"{counted} broken; the first: {found[0]}")
        good = [index for index, problem in enumerate(problems) if problem is None]
        if not good:
            raise ValueError(f"{counted} broken, and none is left; the first: {found[0]}")
        listed = "\n  ".join(problem.removesuffix(MEND) for problem in found[:10])
        rank_zero_warn(f"{counted} left out:\n  {listed}")
        self.skipped += found
        return files.select(good)


def _to_train(files: AnnotatedFiles, keep_empty: bool) -> AnnotatedFiles:
    """Return the images to train on, without crowd boxes; warn of absent classes, raise ValueError if none is there."""
    stated = len(files.annotations.boxes.labels)
    files = replace(files, annotations=files.annotations.without_crowds())
    full = files.annotations.starts.diff().nonzero()[:, 0].tolist()
    if not full:
        why = f"all {stated} boxes are marked as crowds or difficult, which are left out" if stated else "there is none"
        raise ValueError(f"{files.source}: no image has a box to train on ({why}); add boxes of single objects.")
    absent = absent_classes((files.annotations.boxes.labels - 1).tolist(), files.classes)
    if absent:
        rank_zero_warn(
            f"{files.source}: no box of class(es) {quoted(absent)} to train on, which cannot be learned; add some, or "
            "remove the class if it is none."
        )
    return files if keep_empty else files.select(full)


def _to_measure(files: AnnotatedFiles) -> AnnotatedFiles:
    """Return the images to evaluate on; warn if they have no box that counts."""
    if not bool((files.annotations.boxes.iscrowd == 0).any()):
        rank_zero_warn(
            f"{files.source}: no image has a box that counts, so that the average precision will be 0 whatever is "
            "found; evaluate on annotated images."
        )
    return files


def _check_present(files: AnnotatedFiles) -> None:
    """Raise if a file is missing, empty, unreadable or not of the stated size; quick, for it reads heads alone."""
    missing = [path for path in files.paths if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{files.source}: image {missing[0]} is missing ({len(missing)} of {len(files.paths)} are); check the "
            'folder of the images, or set on_bad_image="skip" to leave such images out.'
        )
    check_readable(FolderSamples(list(files.paths), []))
    for index, (path, size) in enumerate(zip(files.paths, files.sizes.tolist(), strict=True)):
        if upright_size(path) != tuple(size):
            files.read(index)  # says so, unless what turns the picture stands behind its pixels


def _problem(files: AnnotatedFiles, index: int) -> str | None:
    try:
        files.read(index)
    except ValueError as error:
        return str(error)
    return None
