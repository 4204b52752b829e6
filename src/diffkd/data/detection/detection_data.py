"""Base of the detection data modules: shared arguments, checks of the splits, and loaders."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn

from diffkd.data.detection.annotated_files import AnnotatedFiles
from diffkd.data.detection.augmentation import FLIP_BOXES, BoxAugmentation
from diffkd.data.detection.dataset import DetectionDataset, collate_detection
from diffkd.data.folders import FolderSamples, absent_classes, allow_outside_links, format_names, is_file
from diffkd.data.image_data import ImageData, evaluated_classes, train_or_val, val_or_hint
from diffkd.data.images import BAD_IMAGE_HINT, OnBadImage, check_on_bad_image, check_readable, upright_size
from diffkd.data.images import white_level as white_level_of
from diffkd.data.loaders import SplitLoaders
from diffkd.data.seeding import split_by_class

Split = Literal["train", "val", "test"]
# Reads the images and boxes of a split; returns None if the split does not exist. The second argument is the result for
# "train", which is read first; the third is whether broken images are kept for later checks.
ReadSplit = Callable[[Split, AnnotatedFiles | None, bool], AnnotatedFiles | None]


class DetectionData(ImageData):
    """Serve images with boxes, decoded by worker processes at their original sizes.

    Boxes are clipped to their image; those without extent are left out with a warning. Crowd boxes are left out of
    training and kept, flagged, in evaluation.

    Args:
        read: function that reads a split.
        batch_size: images per batch and process.
        augmentation: augmentation of training images and their boxes.
        seed: seed of order and augmentation.
        keep_empty: whether to train on images without boxes as well; evaluation always uses all images.
        num_workers: worker processes; None uses one per core, at most 8.
        on_bad_image: "error" refuses missing files before training and stops at a file that cannot be decoded, with its
            name; "skip" decodes every file before training and leaves broken images, annotations and boxes out, with a
            warning that counts and names them.
        verify: with "error" too, decode every file before training, so that a broken file stops the run then and not in
            mid-epoch.
        min_size: shorter side of the detector's input, in pixels, or several to draw from in training. The detector is
            built with this and `max_size`; the images served are not scaled.
        max_size: limit of the longer side of the detector's input.
        follow_links: allow symbolic links that lead out of the folder, as in caches and on shared disks. Set it only if
            you trust the links; names in annotations stay inside in any case.
        val_share: share of the training images that is held back for evaluation, drawn by `seed`, instead of the
            evaluation images; None uses the evaluation images.
        white_level: the value of 16-bit images that is mapped to white, 255; 4095 for 12 bits. None uses 65535, and
            warns if all images would be nearly black.

    Attributes:
        classes: the names of labels 1 to `num_classes`.
        category_ids: the ids of these classes in the files.
        skipped: one message per image left out because it is broken.
        dropped: one message per box left out because it is malformed or has no extent inside its image.

    Raises:
        FileNotFoundError: if an image file is missing.
        ValueError: if no image or no box is left to train on, or a file is broken.
    """

    task = "detection"
    class_hint = "or remove the class if it is none"  # advice for a class without boxes

    def __init__(
        self,
        read: ReadSplit,
        /,
        *,
        batch_size: int = 4,
        augmentation: BoxAugmentation = FLIP_BOXES,
        seed: int = 0,
        keep_empty: bool = True,
        num_workers: int | None = None,
        on_bad_image: OnBadImage = "error",
        verify: bool = False,
        min_size: int | tuple[int, ...] = 800,
        max_size: int = 1333,
        follow_links: bool = False,
        val_share: float | None = None,
        white_level: int | None = None,
    ) -> None:
        check_on_bad_image(on_bad_image)
        skip = on_bad_image == "skip"
        num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        narrowest = _SizeLimits(max_size, augmentation.min_crop)
        check = _Check(skip=skip, decode=verify or skip, threads=num_workers, narrowest=narrowest)
        with allow_outside_links(follow_links):
            train, trains = train_or_val(partial(read, "train", None, skip), partial(read, "val", None, skip))
            if trains:
                val = val_or_hint(partial(read, "val", train, skip)) if val_share is None else None
                test = read("test", train, skip)
            else:
                val = train = _of_evaluated_classes(train)
                test = _of_evaluated_classes(read("test", None, skip))
        if train is not None and val_share is not None and trains:
            kept, held = split_by_class([0] * len(train.paths), val_share, seed)
            train, val = train.select(kept), replace(train.select(held), dropped=(), cut=0)
        if train is None or val is None:
            raise ValueError("there must be images to train on and to evaluate on.")
        white = white_level_of(white_level, train.paths)
        train, val = replace(train, white=white), replace(val, white=white)
        test = None if test is None else replace(test, white=white)
        train = _training_files(check(train), keep_empty, self.class_hint) if trains else val
        training = DetectionDataset(train.annotations, train.read, augmentation, seed)
        evaluation = _evaluation(check(val))
        loaders = SplitLoaders(
            training,
            evaluation,
            training.example,
            batch_size=batch_size,
            seed=seed,
            test=None if test is None else _evaluation(check(test)),
            num_workers=num_workers,
            drop_last=False,
            collate=collate_detection,
        )
        height, width = train.sizes[0].tolist()
        super().__init__(loaders, train.classes, image_size=(height, width))
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.keep_empty, self.num_workers = keep_empty, num_workers
        self.on_bad_image, self.verify = on_bad_image, verify
        self.min_size, self.max_size = min_size, max_size
        self.follow_links, self.val_share, self.white_level = follow_links, val_share, white_level
        self.category_ids = train.category_ids
        self.skipped, self.dropped = check.skipped, check.dropped


class _SizeLimits(NamedTuple):
    """Limits that decide how narrow an image may be.

    Args:
        max_size: limit of the longer side of the detector's input, in pixels.
        min_crop: smallest share of a side that a random crop keeps.
    """

    max_size: int
    min_crop: float

    def problem(self, path: str, size: Sequence[int]) -> str | None:
        """Return why an image of size (H, W) has a side of 0 pixels after the detector's resize; None if it has not."""
        narrow = max(1.0, min(size) * self.min_crop)
        if not min(size) or narrow * self.max_size >= max(size):
            return None
        what = f"image {path} is {size[1]}x{size[0]} pixels, of which nothing is left at max_size={self.max_size}"
        return f"{what}{BAD_IMAGE_HINT}"


class _Check:
    """Checks which images of a split can be used.

    Args:
        skip: leave broken images out instead of refusing them.
        decode: decode every image.
        threads: number of decoding threads.
        narrowest: limits on narrow images.

    Attributes:
        skipped: one message per image left out so far.
        dropped: one message per box that the readers left out.
    """

    def __init__(self, *, skip: bool, decode: bool, threads: int, narrowest: _SizeLimits) -> None:
        self._skip, self._decode, self._threads, self._narrowest = skip, decode, threads, narrowest
        self.skipped: list[str] = []
        self.dropped: list[str] = []

    def __call__(self, files: AnnotatedFiles) -> AnnotatedFiles:
        """Return the usable images; collect messages about what is left out, and warn."""
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
        narrow = [self._narrowest.problem(*one) for one in zip(files.paths, files.sizes.tolist(), strict=True)]
        if not self._decode:
            _check_present(files)
            if problem := next(filter(None, narrow), None):
                raise ValueError(problem)
            return files
        with ThreadPoolExecutor(max(self._threads, 1)) as pool:
            problems = list(pool.map(partial(_problem, files), range(len(files.paths)), chunksize=64))
        problems = [broken or thin for broken, thin in zip(problems, narrow, strict=True)]
        found = [problem for problem in problems if problem is not None]
        if not found:
            return files
        counted = f"{files.source}: {len(found)} of {len(problems)} images are"
        if not self._skip:
            raise ValueError(f"{counted} broken; the first: {found[0]}")
        good = [index for index, problem in enumerate(problems) if problem is None]
        if not good:
            raise ValueError(f"{counted} broken, and none is left; the first: {found[0]}")
        listed = "\n  ".join(problem.removesuffix(BAD_IMAGE_HINT) for problem in found[:10])
        rank_zero_warn(f"{counted} left out:\n  {listed}")
        self.skipped += found
        return files.select(good)


def _training_files(files: AnnotatedFiles, keep_empty: bool, mend: str) -> AnnotatedFiles:
    """Return training images without crowd boxes; warn of absent classes, raise ValueError if there is no box."""
    stated = len(files.annotations.boxes.labels)
    files = replace(files, annotations=files.annotations.without_crowds())
    full = files.annotations.starts.diff().nonzero()[:, 0].tolist()
    if not full:
        why = f"all {stated} boxes are marked as crowds or difficult, which are left out" if stated else "there is none"
        raise ValueError(f"{files.source}: no image has a box to train on ({why}); add boxes of single objects.")
    absent = absent_classes((files.annotations.boxes.labels - 1).tolist(), files.classes)
    if absent:
        rank_zero_warn(
            f"{files.source}: no box of class(es) {format_names(absent)} to train on, which cannot be learned; "
            f"add some, {mend}."
        )
    return files if keep_empty else files.select(full)


def _of_evaluated_classes(files: AnnotatedFiles | None) -> AnnotatedFiles | None:
    """Return images labelled by the classes of the student that is evaluated, of which they may lack some."""
    if files is None or (classes := evaluated_classes(files.classes)) == files.classes:
        return files
    places = torch.tensor([0, *(classes.index(name) + 1 for name in files.classes)])
    boxes = files.annotations.boxes
    boxes = boxes._replace(labels=places[boxes.labels])
    ids = dict(zip(files.classes, files.category_ids, strict=True))
    return replace(
        files,
        annotations=replace(files.annotations, boxes=boxes),
        classes=classes,
        category_ids=tuple(ids.get(name, -1) for name in classes),
    )


def _evaluation(files: AnnotatedFiles) -> DetectionDataset:
    """Return the data set of the evaluation images; warn if it has no box that is counted."""
    if not bool((files.annotations.boxes.iscrowd == 0).any()):
        rank_zero_warn(
            f"{files.source}: no image has a box that counts, so that the average precision will be 0 whatever is "
            "found; evaluate on annotated images."
        )
    return DetectionDataset(files.annotations, files.read)


def _check_present(files: AnnotatedFiles) -> None:
    """Raise if a file is missing, empty, unreadable or not of the stated size; quick, since it reads only headers."""
    missing = [path for path in files.paths if not is_file(path)]
    if missing:
        raise FileNotFoundError(
            f"{files.source}: image {missing[0]} is missing ({len(missing)} of {len(files.paths)} are); check the "
            'folder of the images, or set on_bad_image="skip" to leave such images out.'
        )
    check_readable(FolderSamples(list(files.paths), []))
    for index, (path, size) in enumerate(zip(files.paths, files.sizes.tolist(), strict=True)):
        if upright_size(path) != tuple(size):
            files.read(index)  # raises, unless the orientation is stored after the pixels


def _problem(files: AnnotatedFiles, index: int) -> str | None:
    try:
        files.read(index)
    except ValueError as error:
        return str(error)
    return None
