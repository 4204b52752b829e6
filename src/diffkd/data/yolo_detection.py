"""Images with boxes in the text format of YOLO, as a data module."""

import os
from pathlib import Path

from diffkd.data.annotated_files import AnnotatedFiles
from diffkd.data.bad_images import OnBadImage
from diffkd.data.box_augmentation import FLIP_BOXES, BoxAugmentation
from diffkd.data.detection_files import DetectionFiles
from diffkd.data.image_data import ImageData
from diffkd.data.yolo_folder import YoloFacts, read_yolo, read_yolo_facts


class YoloDetection(ImageData):
    """Serve images whose boxes are in one text file each, decoded by worker processes at their own sizes.

    The boxes of `images/train/a.jpg` are in `labels/train/a.txt`. The files are read and checked when the module is
    made. Boxes are cut at the border of their image; those without extent are left out with a warning.

    Args:
        root: folder of the data set.
        train: folder of the training images, or text file that lists them, relative to the root; None takes what
            `data.yaml` says, or else `images/train`.
        val: that of the evaluation images; None takes what `data.yaml` says, or else `images/val`.
        test: that of the test images; None takes what `data.yaml` says, or else tests on `val`.
        classes: the names of classes 0 to K - 1, which become labels 1 to K; None takes those of `data.yaml`.
        facts: name of the `data.yaml` in the root; it may be missing if `classes` are given.
        batch_size: images per batch and process.
        augmentation: what is done to training images and their boxes.
        seed: seed of order and augmentation.
        keep_empty: whether to train on images without boxes, too; evaluation is always on all images.
        num_workers: worker processes; None takes one per core, at most 8.
        on_bad_image: "error" refuses missing files before training and stops at a file that cannot be decoded, with its
            name; "skip" decodes every file before training and leaves broken ones out, with a warning that names them.
        verify: decode every file before training also for "error", so that it stops then and not in mid-epoch.
        min_size: shorter side at which a detector is to work, in pixels, or several to draw from in training. This and
            `max_size` are for whoever builds the detector; the images served are not scaled.
        max_size: limit of its longer side.

    Attributes:
        classes: the names of labels 1 to `num_classes`.
        category_ids: the numbers these have in the files, from 0.
        skipped: one message per image left out.
        dropped: one message per box left out.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if a file is damaged, a class is unknown, nobody names the classes, or a file leads out of the root.
    """

    task = "detection"

    def __init__(
        self,
        root: str | os.PathLike[str],
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        classes: tuple[str, ...] | None = None,
        facts: str = "data.yaml",
        batch_size: int = 4,
        augmentation: BoxAugmentation = FLIP_BOXES,
        seed: int = 0,
        keep_empty: bool = True,
        num_workers: int | None = None,
        on_bad_image: OnBadImage = "error",
        verify: bool = False,
        min_size: int | tuple[int, ...] = 800,
        max_size: int = 1333,
    ) -> None:
        file = Path(root) / facts
        said = read_yolo_facts(file) if file.is_file() else YoloFacts(None, {})
        names = classes or said.classes
        if not names:
            raise ValueError(f"{file}: no such file, or no names in it; give the names of the classes.")

        def split(name: str, given: str | None) -> AnnotatedFiles:
            places = [given] if given is not None else said.splits.get(name, [f"images/{name}"])
            return read_yolo(root, places, names, skip_bad=on_bad_image == "skip")

        training = split("train", train)
        files = DetectionFiles(
            training,
            split("val", val),
            None if test is None and "test" not in said.splits else split("test", test),
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            keep_empty=keep_empty,
            num_workers=num_workers,
            on_bad_image=on_bad_image,
            verify=verify,
        )
        super().__init__(files.splits, training.classes, image_size=files.image_size)
        self.root, self.train, self.val, self.test = root, train, val, test
        self.facts = facts
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.keep_empty, self.num_workers = keep_empty, files.num_workers
        self.on_bad_image, self.verify = on_bad_image, verify
        self.min_size, self.max_size = min_size, max_size
        self.category_ids = training.category_ids
        self.skipped, self.dropped = files.skipped, files.dropped
