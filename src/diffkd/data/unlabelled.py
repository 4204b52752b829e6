"""Images without labels, for distilling representations, and the labelled images by which these are measured."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffkd.data.classification.augmentation import Augmentation
from diffkd.data.classification.image_folder import FLIP, FolderDataset, eval_transform, train_transform
from diffkd.data.folders import (
    EXTENSIONS,
    FolderSamples,
    allow_outside_links,
    enclosed_files,
    enclosed_folder,
    format_names,
    image_files,
    is_file,
    read_text,
    scan_folder,
)
from diffkd.data.image_data import ImageData
from diffkd.data.images import OnBadImage, check_on_bad_image, check_readable, verify_images
from diffkd.data.images import white_level as white_level_of
from diffkd.data.loaders import UnlabelledLoaders
from diffkd.data.seeding import mix_seed, split_by_class
from diffkd.data.shards import SHARD, members_of
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD, check_statistics

NO_LABEL = -1
_PROBE_SHARE = 0.2  # of the labelled images, which are classified by the others where they have no evaluation split


class Probe(NamedTuple):
    """Labelled images by which representations are measured."""

    classes: tuple[str, ...]
    bank: FolderSamples
    queries: FolderSamples


class UnlabelledFolder(ImageData):
    """Serve the images of a folder tree without labels, to distil the representation of a teacher.

    Images are found by extension at any depth below `root`; hidden files are ignored and other files are passed over
    with a warning. Where there is no image but uncompressed tar archives, these are shards, as WebDataset packs them,
    whose images are read at their places, in the same order as those of files. Training images get a random resized
    crop; held-out images are resized and centre-cropped. All are converted to upright 8-bit RGB (`diffkd.data.images`).

    Args:
        root: the folder, or one tar archive.
        batch_size: images per batch and process.
        augmentation: augmentation of training images besides the random resized crop; `crop_padding` must be 0.
        seed: seed of order and augmentation.
        image_size: side of the square input images, in pixels.
        min_crop_area: smallest area of the random resized crop, as a fraction of the image.
        crop_ratio: fraction of the shorter side that the centre crop keeps in evaluation.
        num_workers: worker processes; None uses one per core, at most 8.
        on_bad_image: as for `ImageFolder`: "error" or "skip".
        verify: with "error" too, decode every file before training.
        mean: three values, in units of [0, 1].
        std: three values, in units of [0, 1].
        follow_links: allow symbolic links that lead out of the folder. Set it only if you trust the links.
        files: text file with the names of the images (or archives) to use, one a line, relative to `root`; None uses
            all.
        val: folder of images (or archives) to hold out, below `root` or by its absolute path; None draws `val_share`
            of the images.
        val_share: share of the images to hold out, drawn by `seed`. At least two are.
        probe: folder of labelled images, `train/<class>/` and `val/<class>/` as for `ImageFolder` (without `val`, a
            fifth of `train` takes its place), by which student and teacher are measured; nothing learns from its
            labels. None: no probe.
        white_level: as for `ImageFolder`: the value of 16-bit images that is mapped to white, 255.

    Attributes:
        skipped: one message per image left out.

    Raises:
        FileNotFoundError: if a folder or the list is missing.
        ValueError: if there are fewer than two images to train on or to hold out, the probe has one class, a link
            leaves the root, or a value is out of range.
    """

    task = "representation"

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 256,
        augmentation: Augmentation = FLIP,
        seed: int = 0,
        image_size: int = 224,
        min_crop_area: float = 0.08,
        crop_ratio: float = 0.875,
        num_workers: int | None = None,
        on_bad_image: OnBadImage = "error",
        verify: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        follow_links: bool = False,
        files: str | Path | None = None,
        val: str | None = None,
        val_share: float = 0.05,
        probe: str | Path | None = None,
        white_level: int | None = None,
    ) -> None:
        if augmentation.crop_padding:
            raise ValueError(
                f"crop_padding={augmentation.crop_padding} is for images in memory, folders are cut by min_crop_area; "
                "set crop_padding to 0."
            )
        if not (0 < min_crop_area <= 1 and 0 < crop_ratio <= 1 and image_size > 0 and 0 < val_share < 1):
            raise ValueError(
                f"min_crop_area={min_crop_area} and crop_ratio={crop_ratio} must be in (0, 1], val_share={val_share} "
                f"above 0 and below 1, image_size={image_size} above 0."
            )
        check_statistics(mean, std)
        check_on_bad_image(on_bad_image)
        num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        with allow_outside_links(follow_links):
            paths, held = _scan(Path(root), files, val)
            labelled = None if probe is None else scan_probe(probe, seed)
        skipped: list[str] = []
        decode = verify or on_bad_image == "skip"
        paths, held = (
            _readable(some, decode, on_bad_image, num_workers, skipped, what)
            for some, what in ((paths, root), (held, val))
        )
        if labelled is not None:
            bank, queries = (
                _readable_labelled(part, decode, on_bad_image, num_workers, skipped, probe)
                for part in (labelled.bank, labelled.queries)
            )
            labelled = Probe(labelled.classes, bank, queries)
        if val is None:
            paths, held = hold_out_paths(paths, val_share, seed, root)
        if len(paths) < 2 or len(held) < 2:
            raise ValueError(
                f"{root}: {len(paths)} image(s) to train on and {len(held)} to hold out, at least two are needed of "
                "each: add images."
            )
        white = white_level_of(white_level, paths)
        evaluation = eval_transform(image_size, crop_ratio, mean, std)
        training = train_transform(augmentation, image_size, min_crop_area, mean, std)
        train = FolderSamples(paths, [NO_LABEL] * len(paths))
        loaders = UnlabelledLoaders(
            FolderDataset(train, training, seed, white),
            FolderDataset(FolderSamples(held, [NO_LABEL] * len(held)), evaluation, white=white),
            partial(_example, FolderDataset(train, evaluation, white=white)),
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            bank=None if labelled is None else FolderDataset(labelled.bank, evaluation, white=white),
            queries=None if labelled is None else FolderDataset(labelled.queries, evaluation, white=white),
        )
        super().__init__(loaders, (), image_size=(image_size, image_size), mean=mean, std=std)
        self.has_probe = labelled is not None
        # The argument is one side; the attribute holds both.
        self.save_hyperparameters("image_size", logger=False)
        self.root, self.files, self.val, self.val_share, self.probe = root, files, val, val_share, probe
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.min_crop_area, self.crop_ratio = min_crop_area, crop_ratio
        self.num_workers = num_workers
        self.on_bad_image, self.verify = on_bad_image, verify
        self.follow_links, self.white_level = follow_links, white_level
        self.probe_classes = () if labelled is None else labelled.classes
        self.skipped = skipped


def scan_probe(root: str | Path, seed: int = 0) -> Probe:
    """List the labelled images of a probe; without evaluation images, a fifth of the training images is taken.

    Raises:
        FileNotFoundError: if there is no folder `train`.
        ValueError: as :func:`~diffkd.data.folders.scan_folder`, and if there is only one class.
    """
    try:
        classes, bank, queries = scan_folder(root)
    except FileNotFoundError:
        classes, bank, _ = scan_folder(root, val=False)
        kept, held = split_by_class(bank.labels, _PROBE_SHARE, seed)
        bank, queries = bank.select(kept), bank.select(held)
    if len(classes) < 2:
        raise ValueError(
            f"{root}: the probe has one class ({classes[0]}), which every image belongs to, so that it measures "
            "nothing: give folders of two classes or more, or leave probe out."
        )
    return Probe(classes, bank, queries)


def hold_out_paths(
    paths: Sequence[str], share: float, seed: int, root: str | os.PathLike[str] = ""
) -> tuple[list[str], list[str]]:
    """Draw files to hold out, at least two; a function of number, share and seed.

    Args:
        paths: the files.
        share: share to hold out.
        seed: of the draw.
        root: their folder, for messages.

    Returns:
        The files kept and the files held out, each in the given order.

    Raises:
        ValueError: if fewer than two would be left.
    """
    count = max(2, round(share * len(paths)))
    if len(paths) - count < 2:
        raise ValueError(
            f"{root}: {len(paths)} image(s), of which two or more are to be trained on and {count} to be held out "
            "(val_share): add images, or name others as val."
        )
    generator = torch.Generator().manual_seed(mix_seed(seed, len(paths)))
    held = set(torch.randperm(len(paths), generator=generator)[:count].tolist())
    return (
        [path for index, path in enumerate(paths) if index not in held],
        [path for index, path in enumerate(paths) if index in held],
    )


def _scan(root: Path, files: str | Path | None, val: str | None) -> tuple[list[str], list[str]]:
    """Return the images to train on and, where `val` names their folder, those to hold out."""
    if root.suffix.lower() == SHARD and root.is_file() and files is None:
        return _packed([str(root)]), [] if val is None else _images_below(enclosed_folder(root.parent, val))
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give a folder of images, at any depth.")
    held = [] if val is None else _images_below(enclosed_folder(root, val))
    paths = _images_below(root) if files is None else _listed(root, Path(files))
    apart = {os.path.realpath(path) for path in held}
    return [path for path in paths if not apart or os.path.realpath(path) not in apart], held


def _images_below(folder: Path) -> list[str]:
    others: Counter[str] = Counter()
    paths = image_files(folder, folder.resolve(), others)
    if not paths and others[SHARD]:
        return _packed(image_files(folder, folder.resolve(), extensions=frozenset({SHARD})))
    if not paths:
        kinds = f"only {format_names(sorted(others))}" if others else "no files"
        raise ValueError(f"{folder}: no images, {kinds}; add images ({', '.join(sorted(EXTENSIONS))}).")
    if others:
        rank_zero_warn(
            f"{folder}: {others.total()} file(s) are passed over, whose names are not those of images "
            f"({format_names(sorted(others))}); save images as .png or .jpg."
        )
    return paths


def _packed(shards: Sequence[str]) -> list[str]:
    """Return the images in tar archives. Other files in them are not told of: each image has its labels beside it."""
    others: Counter[str] = Counter()
    paths = [member for shard in shards for member in members_of(shard, EXTENSIONS, others)]
    if not paths:
        kinds = f"only {format_names(sorted(others))}" if others else "no files"
        raise ValueError(f"{shards[0]}: no images in {len(shards)} tar archive(s), {kinds}; give archives of images.")
    return list(paths)


def _listed(root: Path, source: Path) -> list[str]:
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; give a text file with one name of an image a line.")
    names = [line.strip() for line in read_text(source).splitlines() if line.strip()]
    paths = enclosed_files(root, dict.fromkeys(names), source)
    missing = [path for path in paths if not is_file(path)]
    if missing:
        raise FileNotFoundError(f"{source}: {len(missing)} of its files are not in {root}, first {missing[0]!r}.")
    if not paths:
        raise ValueError(f"{source}: names no image; give one a line.")
    return [one for path in paths for one in (_packed([path]) if path.lower().endswith(SHARD) else [path])]


def _readable(
    paths: list[str],
    decode: bool,
    on_bad_image: OnBadImage,
    threads: int,
    skipped: list[str],
    where: str | os.PathLike[str] | None,
) -> list[str]:
    samples = FolderSamples(paths, [NO_LABEL] * len(paths))
    return _readable_labelled(samples, decode, on_bad_image, threads, skipped, where).paths


def _readable_labelled(
    samples: FolderSamples,
    decode: bool,
    on_bad_image: OnBadImage,
    threads: int,
    skipped: list[str],
    where: str | os.PathLike[str] | None,
) -> FolderSamples:
    """Return the samples that can be read; raise ValueError, or warn and note in `skipped`, for others."""
    if not decode:
        check_readable(samples)
        return samples
    good, problems = verify_images(samples, threads)
    if problems and on_bad_image == "error":
        raise ValueError(
            f"{where}: {len(problems)} of {len(samples.paths)} images are broken; the first: {problems[0]}"
        )
    if problems:
        rank_zero_warn(f"{where}: {len(problems)} of {len(samples.paths)} images are left out, first {problems[0]}")
        skipped.extend(problems)
    return good


def _example(data: FolderDataset) -> Tensor:
    """Return the first and the last image, (2, 3, H, W)."""
    return torch.stack([data[0, index][0] for index in (0, len(data) - 1)])
