"""Find broken images before training instead of in the middle of it."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from diffkd.data.absent_classes import absent_classes
from diffkd.data.decode import read_rgb
from diffkd.data.folder_scan import FolderSamples
from diffkd.data.quoting import quoted


class Verified(NamedTuple):
    """Hold the samples that can be decoded, and one message for each that cannot."""

    samples: FolderSamples
    problems: list[str]


def verify_images(samples: FolderSamples, threads: int = 1) -> Verified:
    """Decode every image once and part the good ones from the broken ones.

    Args:
        samples: files and labels.
        threads: images decoded at a time; decoding frees the interpreter lock.

    Returns:
        The good samples, in their order, and the messages that name the broken files.
    """
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        problems = list(pool.map(_problem, samples.paths, chunksize=64))
    good = [index for index, problem in enumerate(problems) if problem is None]
    return Verified(
        FolderSamples([samples.paths[index] for index in good], [samples.labels[index] for index in good]),
        [problem for problem in problems if problem is not None],
    )


def check_readable(samples: FolderSamples) -> None:
    """Raise ValueError that names the first file which may not be read or is empty; quick, for it decodes nothing."""
    bad = [path for path in samples.paths if not os.access(path, os.R_OK) or not Path(path).stat().st_size]
    if bad:
        raise ValueError(
            f"image {bad[0]} is empty or may not be read ({len(bad)} such files); replace or remove it, "
            'or set on_bad_image="skip" to leave such images out.'
        )


def check_every_class(train: FolderSamples, val: FolderSamples, classes: Sequence[str]) -> None:
    """Warn of classes that cannot be measured; raise ValueError if one cannot be learned, or nothing be measured."""
    empty = absent_classes(train.labels, classes)
    if empty:
        raise ValueError(f"train: no readable image of class(es) {quoted(empty)} is left; add some or remove them.")
    if not val.paths:
        raise ValueError("val: no readable image is left; add some.")
    unmeasured = absent_classes(val.labels, classes)
    if unmeasured:
        rank_zero_warn(
            f"val: no image of class(es) {quoted(unmeasured)}, of which accuracy will say nothing; add some, or remove "
            "them from train."
        )


def _problem(path: str) -> str | None:
    try:
        read_rgb(path)
    except ValueError as error:
        return str(error)
    return None
