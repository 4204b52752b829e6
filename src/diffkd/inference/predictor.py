"""Predictions of a saved student for image files."""

import glob
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from diffkd.data.classification.image_folder import eval_transform
from diffkd.data.folders import EXTENSIONS, allow_outside_links, format_names, image_files
from diffkd.data.images import BAD_IMAGE_HINT, WHITE, read_rgb
from diffkd.inference.students import SavedStudent
from diffkd.models.segmenters.any_size import AnySize, upsample
from diffkd.tasks.classification import class_scores
from diffkd.tasks.options import SegmentationOptions

_BATCHES = {"classification": 64, "segmentation": 4, "detection": 4}
_USUAL_CROP = 0.875  # of ImageFolder


@dataclass(frozen=True)
class Prediction:
    """What a student predicts for one image.

    Attributes:
        path: the image file.
        name: its path relative to the folder that all images are in, with forward slashes.
        image: the image, upright, in RGB.
        found: for classification "scores" (K,), probabilities, which add up to 1 unless an image may have several
            classes; for detection "boxes" (n, 4), left, top, right and bottom in pixels, "scores" (n,) and "labels"
            (n,) from 1; for segmentation "ids" (H, W) uint8 or int32, and "confidence" (H, W), the probability of the
            predicted class. All on the CPU.
    """

    path: Path
    name: str
    image: Image.Image
    found: Mapping[str, Tensor]


class Predictor:
    """Predicts for images of any size; they are prepared as evaluation images were in the student's training.

    Args:
        student: the student.
        device: where it runs.
        crop_ratio: for classification, share of the shorter side that the centre crop keeps; None: as in training.

    Raises:
        ValueError: if it is a backbone without classifier, it was trained on floats that are no pixels, its card
            describes the preparation of images wrongly, or `crop_ratio` is out of range.
    """

    def __init__(
        self, student: SavedStudent, *, device: torch.device | str = "cpu", crop_ratio: float | None = None
    ) -> None:
        if student.facts.task == "representation":
            raise ValueError(
                f"{student.path} is a backbone, which predicts no classes: fine-tune it first (`diffkd fit "
                f"finetune/classification --student_weights {student.path} --data.root FOLDER`), or take its "
                "embeddings from a program (`diffkd export`)"
            )
        self.student, self.device = student, torch.device(device)
        if student.facts.pixel_unit is None:
            raise ValueError(
                f"{student.path} was trained on floats that are no pixels in [0, 1] or [0, 255], so that no image file "
                "can be prepared for it: call it from Python (diffkd.inference.load_student) with such floats"
            )
        self.task, self.classes = student.facts.task, _class_names(student)
        self.multi_label = student.facts.multi_label
        self.options = SegmentationOptions(**_tuples(student.card.get("segmentation") or {}))
        arguments = (student.card.get("data") or {}).get("init_args") or {}
        self.white = int(arguments.get("white_level") or WHITE)
        if crop_ratio is not None and (not 0 < crop_ratio <= 1 or self.task != "classification"):
            raise ValueError(
                f"crop_ratio {crop_ratio} must be above 0 and at most 1, and is for classifiers: leave it out"
            )
        self._prepare = self._preparation(arguments, crop_ratio)
        self._run: Callable[[Tensor], Tensor] = student.module
        if self.task == "segmentation":
            self._run = self._segmenter()

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, Tensor]]:
        """Return for each image in RGB what :class:`Prediction` has as `found`."""
        given = [self._prepare(image).to(self.device) for image in images]
        if self.task == "detection":
            detected: Any = self.student.module(given)
            return [{name: one[name].cpu() for name in ("boxes", "scores", "labels")} for one in detected]
        outputs: dict[int, Tensor] = {}
        for shape in dict.fromkeys(one.shape for one in given):
            alike = [index for index, one in enumerate(given) if one.shape == shape]
            logits = self._run(torch.stack([given[index] for index in alike]))
            outputs |= dict(zip(alike, logits, strict=True))
        make = self._mask if self.task == "segmentation" else self._scores
        return [make(outputs[index], image) for index, image in enumerate(images)]

    def _scores(self, logits: Any, image: Image.Image) -> dict[str, Tensor]:
        return {"scores": class_scores(logits, multi_label=self.multi_label).cpu()}

    def _mask(self, logits: Tensor, image: Image.Image) -> dict[str, Tensor]:
        full = upsample(logits[None].float(), (image.height, image.width))[0]
        best, ids = full.softmax(dim=0).max(dim=0)
        return {"ids": ids.to(torch.uint8 if len(full) <= 256 else torch.int32).cpu(), "confidence": best.cpu()}

    def _segmenter(self) -> Callable[[Tensor], Tensor]:
        from diffkd.tasks.segmentation import sliding_window

        whole = AnySize(self.student.module) if self.student.runtime == "pytorch" else self.student.module
        window = self.options.window
        if window is None:
            return whole
        classes = self.student.facts.num_classes
        return lambda images: sliding_window(
            whole, images, window=window, stride=self.options.stride, num_classes=classes
        )

    def _preparation(self, arguments: Mapping[str, Any], crop_ratio: float | None) -> Callable[[Image.Image], Tensor]:
        """Return the function from an image in RGB to the student's input, (C, H, W)."""
        facts, mean, std = self.student.facts, self.student.mean, self.student.std
        normalised = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])
        if self.task == "detection":
            normalised = v2.ToDtype(torch.float32, scale=True)
        if self.task != "classification":
            resize = arguments.get("resize") if self.task == "segmentation" else None

            def whole(image: Image.Image) -> Tensor:
                pixels = _pixels(image, facts.in_channels)
                scaled = pixels if resize is None else functional.resize(pixels, [int(side) for side in resize])
                prepared: Tensor = normalised(scaled)
                return prepared

            return whole
        described = str((self.student.card.get("data") or {}).get("class_path", "")).rpartition(".")[2]
        height, width = facts.image_size
        folder = described == "ImageFolder"
        if crop_ratio is None:
            crop_ratio = float(arguments.get("crop_ratio") or _USUAL_CROP) if folder else 1.0
        if height == width and facts.in_channels == 3 and (folder or crop_ratio < 1):
            transform: Callable[[Image.Image], Tensor] = eval_transform(height, crop_ratio, mean, std)
            return transform

        def middle(image: Image.Image) -> Tensor:
            pixels = _pixels(image, facts.in_channels)
            if pixels.shape[1:] != (height, width) or crop_ratio < 1:
                # Large enough for the crop on both sides.
                scale = max(height / image.height, width / image.width) / crop_ratio
                size = [math.ceil(round(side * scale, 6)) for side in (image.height, image.width)]
                pixels = functional.center_crop(functional.resize(pixels, size), [height, width])
            prepared: Tensor = normalised(pixels)
            return prepared

        return middle


def _pixels(image: Image.Image, channels: int) -> Tensor:
    if channels not in (1, 3):
        raise ValueError(
            f"this student takes {channels} channels, image files are read with 1 or 3: call it from Python"
        )
    pixels: Tensor = functional.pil_to_tensor(image.convert("L") if channels == 1 else image)
    return pixels


def _class_names(student: SavedStudent) -> tuple[str, ...]:
    names = tuple(map(str, student.facts.classes))
    count = student.facts.num_classes
    return names if len(names) == count else tuple(f"class {index}" for index in range(count))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def find_images(sources: Sequence[str]) -> dict[str, Path]:
    """Return image files by their names, which are relative to the folder that all of them are in.

    Args:
        sources: image files, folders, which are searched at any depth, and glob patterns such as "shots/**/*.jpg".

    Raises:
        FileNotFoundError: if one of the sources does not exist, or holds no image.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            with allow_outside_links(True):
                inside = [Path(name) for name in image_files(path, path.resolve())]
            if not inside:
                raise FileNotFoundError(
                    f"there is no image in {path}: give a folder with files of {', '.join(sorted(EXTENSIONS))}"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        elif glob.has_magic(source):
            matching = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
            matching = [one for one in matching if one.is_file() and one.suffix.lower() in EXTENSIONS]
            if not matching:
                raise FileNotFoundError(f"no image matches {source}: correct the pattern")
            found += matching
        else:
            raise FileNotFoundError(f"there is no image, folder or pattern {source}: correct the path")
    if not found:
        raise FileNotFoundError("no images were given: name files, a folder, or a pattern such as 'shots/*.jpg'")
    # A file that two sources name is predicted once.
    unique = list({path.absolute(): None for path in found})
    top = Path(os.path.commonpath([path.parent for path in unique]))
    return {path.relative_to(top).as_posix(): path for path in unique}


def predict_files(
    predictor: Predictor,
    files: Mapping[str, Path],
    *,
    batch_size: int | None = None,
    on_bad: Callable[[str], object] | None = None,
) -> Iterator[Prediction]:
    """Return an iterator over the predictions for files in order; one batch ahead is decoded meanwhile.

    Args:
        predictor: the student.
        files: image files by name.
        batch_size: images in a batch; None: 64 for classification, 4 for the other tasks.
        on_bad: called with a message about each file that cannot be read, which is left out; None raises the error.

    Raises:
        ValueError: if `batch_size` is less than 1, or a file cannot be read and there is no `on_bad`.
    """
    size = _BATCHES[predictor.task] if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    return _predictions(predictor, files, size, on_bad)


def _predictions(
    predictor: Predictor, files: Mapping[str, Path], size: int, on_bad: Callable[[str], object] | None
) -> Iterator[Prediction]:
    names = list(files)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def decoding(start: int) -> list[tuple[str, "Future[Image.Image]"]]:
            chosen = names[start : start + size]
            return [(name, pool.submit(read_rgb, files[name], predictor.white)) for name in chosen]

        ahead = decoding(0)
        for start in range(0, len(names), size):
            batch, ahead = ahead, decoding(start + size)
            images: dict[str, Image.Image] = {}
            for name, future in batch:
                try:
                    images[name] = future.result()
                except ValueError as error:
                    if on_bad is None:
                        raise
                    on_bad(str(error).removesuffix(BAD_IMAGE_HINT))
            if images:
                for (name, image), found in zip(images.items(), predictor(list(images.values())), strict=True):
                    yield Prediction(files[name], name, image, found)


def unreadable(problems: Sequence[str]) -> str:
    """Return a line about the image files that were left out."""
    return f"{len(problems)} image(s) were left out: {format_names(problems)}"
