"""Images with boxes in Pascal VOC's XML format, as a data module."""

import os

from diffkd.data.bad_images import OnBadImage
from diffkd.data.box_augmentation import FLIP_BOXES, BoxAugmentation
from diffkd.data.detection_files import DetectionFiles
from diffkd.data.image_data import ImageData
from diffkd.data.voc_file import find_voc_split, read_voc


class VocDetection(ImageData):
    """Serve images whose boxes are in one XML file each, decoded by worker processes at their own sizes.

    A split is a list `ImageSets/Main/SPLIT.txt` over `Annotations/*.xml` and `JPEGImages`, or a folder of XML files and
    images side by side. The files are read and checked when the module is made. Boxes are cut at the border of their
    image; those without extent are left out with a warning. Objects marked as difficult are left out of training and
    stay, flagged as crowds, in evaluation.

    Args:
        root: folder of the data set.
        train: name of the training split.
        val: name of the evaluation split.
        test: name of the test split; None tests on `val`.
        classes: the names of labels 1 to K; None takes those that occur in the training split, sorted.
        first_pixel: the number of the first pixel: 1 for the official VOC files, whose corners count from 1 and are
            inclusive; 0 takes corners as they are.
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
        category_ids: the labels themselves.
        skipped: one message per image left out.
        dropped: one message per box left out.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if a file is damaged, an object is of an unknown class, or a file leads out of the folder.
    """

    task = "detection"

    def __init__(
        self,
        root: str | os.PathLike[str],
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        classes: tuple[str, ...] | None = None,
        first_pixel: int = 0,
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
        training = read_voc(find_voc_split(root, train), classes, first_pixel)
        files = DetectionFiles(
            training,
            read_voc(find_voc_split(root, val), training.classes, first_pixel),
            None if test is None else read_voc(find_voc_split(root, test), training.classes, first_pixel),
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
        self.first_pixel = first_pixel
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.keep_empty, self.num_workers = keep_empty, files.num_workers
        self.on_bad_image, self.verify = on_bad_image, verify
        self.min_size, self.max_size = min_size, max_size
        self.category_ids = training.category_ids
        self.skipped, self.dropped = files.skipped, files.dropped
