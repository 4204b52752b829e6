"""Images with boxes in COCO's JSON format, as a data module."""

import os
from pathlib import Path

from diffkd.data.annotated_files import AnnotatedFiles
from diffkd.data.bad_images import OnBadImage
from diffkd.data.box_augmentation import FLIP_BOXES, BoxAugmentation
from diffkd.data.coco_file import read_coco
from diffkd.data.detection_files import DetectionFiles
from diffkd.data.enclosed import enclosed_folder
from diffkd.data.image_data import ImageData


class CocoDetection(ImageData):
    """Serve images whose boxes are in COCO JSON files, decoded by worker processes at their own sizes.

    For COCO itself: `CocoDetection("coco", "annotations/instances_train2017.json",
    "annotations/instances_val2017.json", images="train2017", val_images="val2017")`.

    The files are read and checked when the module is made. Boxes are cut at the border of their image; those without
    extent are left out with a warning. Crowd boxes (`iscrowd`) are left out of training and stay, flagged, in
    evaluation.

    Args:
        root: folder that the other names are relative to.
        train: JSON file of the training images.
        val: JSON file of the evaluation images; its categories must be among those of `train`.
        test: JSON file of the test images; None tests on `val`.
        images: folder that the file names of the training images are relative to.
        val_images: that of the evaluation images; None takes `images`.
        test_images: that of the test images; None takes that of the evaluation images.
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
        classes: the names of labels 1 to `num_classes`, ordered by category id.
        category_ids: the ids these have in the files.
        skipped: one message per image left out.
        dropped: one message per box left out.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if a file is damaged or contradicts itself, or names a file outside of its folder; see `read_coco`.
    """

    task = "detection"

    def __init__(
        self,
        root: str | os.PathLike[str],
        train: str = "train.json",
        val: str = "val.json",
        test: str | None = None,
        images: str = "images",
        val_images: str | None = None,
        test_images: str | None = None,
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
        top = Path(root)
        skip_bad = on_bad_image == "skip"
        training = read_coco(top / train, enclosed_folder(top, images), skip_bad=skip_bad)
        categories = dict(zip(training.category_ids, training.classes, strict=True))

        def other(file: str, *folders: str | None) -> AnnotatedFiles:
            folder = next(folder for folder in folders if folder is not None)
            return read_coco(top / file, enclosed_folder(top, folder), categories, skip_bad=skip_bad)

        files = DetectionFiles(
            training,
            other(val, val_images, images),
            None if test is None else other(test, test_images, val_images, images),
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
        self.images, self.val_images, self.test_images = images, val_images, test_images
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.keep_empty, self.num_workers = keep_empty, files.num_workers
        self.on_bad_image, self.verify = on_bad_image, verify
        self.min_size, self.max_size = min_size, max_size
        self.category_ids = training.category_ids
        self.skipped, self.dropped = files.skipped, files.dropped
