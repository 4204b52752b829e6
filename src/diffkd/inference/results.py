"""Files of predictions: tables as JSON or CSV, COCO boxes, masks, pictures, and pseudo-labels to train on."""

import csv
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from diffkd.data.segmentation.palette import palette
from diffkd.files.weights import write_text
from diffkd.inference.pictures import classes_found, draw_prediction
from diffkd.inference.predictor import Prediction

Format = Literal["json", "csv"]
PSEUDO_LABELS = "pseudo_labels"
_TOP = 5  # classes of an image in the table
_IGNORED, _MOST_IN_BYTE = 255, 255
_DATA = {"classification": "ImageFolder", "detection": "CocoDetection", "segmentation": "MaskFolder"}


class PredictionFiles:
    """Writes predictions into a new folder.

    `predictions.json` or `.csv` is written by :meth:`close`, everything else at once. For detection the JSON is a COCO
    file, whose annotations also have a "score". Where an image may have several classes, an image of the JSON has those
    with at least the threshold as "found", and the CSV a row for each of them.

    Args:
        out: the folder; it must not exist, or be empty.
        task: the student's task.
        classes: names of the K classes.
        kind: "json" or "csv".
        pictures: draw every prediction into `pictures/`.
        pseudo_labels: write the images with what was predicted as a training set into `pseudo_labels/`.
        threshold: smallest score: boxes, and classes where an image may have several, are left out below it everywhere;
            in the pseudo-labels also images, for classification, and pixels, which are ignored then, for segmentation.
            None: 0.3 for boxes, 0.5 where an image may have several classes, no limit else.
        multi_label: whether an image may have several classes.

    Raises:
        FileExistsError: if the folder is not empty.
        ValueError: if `threshold` is no probability, or pseudo-labels are to be written for images that may have
            several classes.
        OSError: if the folder cannot be written.
    """

    def __init__(
        self,
        out: Path,
        task: str,
        classes: Sequence[str],
        *,
        kind: Format = "json",
        pictures: bool = False,
        pseudo_labels: bool = False,
        threshold: float | None = None,
        multi_label: bool = False,
    ) -> None:
        if pseudo_labels and multi_label:
            raise ValueError(
                "pseudo_labels are a folder for each class, and an image may have several classes of this student: "
                "leave the option out, and put the classes that the table has as found into a .npz for Arrays"
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold} is no score: give one from 0 to 1, or leave it out")
        self.out, self.task, self.classes, self.kind = out, task, tuple(classes), kind
        usual = 0.5 if multi_label else 0.3 if task == "detection" else 0.0
        self.threshold, self.multi_label = usual if threshold is None else threshold, multi_label
        self.pictures = pictures
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self._names: set[str] = set()
        new_folder(out)
        self.labels = _PseudoLabels(out / PSEUDO_LABELS, task, self.classes, self.threshold) if pseudo_labels else None

    def add(self, prediction: Prediction) -> None:
        """Write mask, picture and pseudo-label of a prediction, and keep its row of the table."""
        found = dict(prediction.found)
        if self.task == "detection":
            found = above(found, self.threshold)
        # a.jpg and a.png would have the same mask.
        stem = str(PurePosixPath(prediction.name).with_suffix(""))
        stem = prediction.name if stem in self._names else stem
        self._names.add(stem)
        {"classification": self._add_scores, "detection": self._add_boxes, "segmentation": self._add_mask}[self.task](
            prediction, found, stem
        )
        if self.pictures:
            caption = classes_found(found["scores"], self.classes, self.threshold) if self.multi_label else None
            picture = draw_prediction(prediction.image, found, self.classes, caption=caption)
            picture.save(_parent_made(self.out / "pictures" / f"{stem}.png"))
        if self.labels is not None:
            self.labels.add(prediction, found, stem)

    def close(self) -> Path:
        """Write the table of all predictions so far, and return its path."""
        path = self.out / f"predictions.{self.kind}"
        write_text(path, self._csv() if self.kind == "csv" else json.dumps(self._json(), indent=1) + "\n")
        if self.labels is not None:
            self.labels.close()
        return path

    def _add_scores(self, prediction: Prediction, found: Mapping[str, Tensor], stem: str) -> None:
        number = int((found["scores"] >= self.threshold).sum()) if self.multi_label else 0
        scores, best = found["scores"].topk(max(number, min(_TOP, len(self.classes))))
        ranked = [
            {"class": self.classes[label], "label": label, "score": round(score, 6)}
            for score, label in zip(scores.tolist(), best.tolist(), strict=True)
        ]
        if self.multi_label:
            self.counts.update(str(one["class"]) for one in ranked[:number])
            self.images.append({"file": prediction.name, "found": ranked[:number], "top": ranked[:_TOP]})
        else:
            self.counts[str(ranked[0]["class"])] += 1
            self.images.append({"file": prediction.name, **ranked[0], "top": ranked[:_TOP]})

    def _add_boxes(self, prediction: Prediction, found: Mapping[str, Tensor], stem: str) -> None:
        number = len(self.images) + 1
        entry = {"id": number, "file_name": prediction.name}
        self.images.append(entry | {"width": prediction.image.width, "height": prediction.image.height})
        self.annotations += coco_annotations(found, number, len(self.annotations) + 1)
        self.counts.update(self.classes[label - 1] for label in found["labels"].tolist() if label <= len(self.classes))

    def _add_mask(self, prediction: Prediction, found: Mapping[str, Tensor], stem: str) -> None:
        ids = found["ids"]
        mask = f"masks/{stem}.png"
        save_mask(_parent_made(self.out / mask), ids, len(self.classes))
        labels, pixels = np.unique(ids.numpy(), return_counts=True)
        shares = {
            self.classes[label]: round(count / ids.numel(), 6)
            for label, count in zip(labels.tolist(), pixels.tolist(), strict=True)
        }
        self.counts.update(shares.keys())
        self.images.append(
            {"file": prediction.name, "mask": mask, "confidence": round(float(found["confidence"].mean()), 6)}
            | {"share": shares}
        )

    def _json(self) -> dict[str, Any]:
        if self.task == "detection":
            return coco_file(self.images, self.annotations, self.classes)
        return {"task": self.task, "classes": list(self.classes), "images": self.images}

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if self.multi_label:
            writer.writerow(["file", "class", "score"])
            for image in self.images:
                writer.writerows([image["file"], one["class"], one["score"]] for one in image["found"])
        elif self.task == "classification":
            count = min(_TOP, len(self.classes))
            writer.writerow(["file", *(f"{what}{rank}" for rank in range(1, count + 1) for what in ("class", "score"))])
            for image in self.images:
                writer.writerow([image["file"], *(one[key] for one in image["top"] for key in ("class", "score"))])
        elif self.task == "detection":
            files = {image["id"]: image["file_name"] for image in self.images}
            writer.writerow(["file", "class", "score", "left", "top", "width", "height"])
            for box in self.annotations:
                name = self.classes[box["category_id"] - 1]
                writer.writerow([files[box["image_id"]], name, box["score"], *box["bbox"]])
        else:
            writer.writerow(["file", "mask", "class", "share"])
            for image in self.images:
                writer.writerows([image["file"], image["mask"], name, share] for name, share in image["share"].items())
        return text.getvalue()


class _PseudoLabels:
    """A training set of images and what was predicted for them, in the format of a data module of this package."""

    def __init__(self, root: Path, task: str, classes: tuple[str, ...], threshold: float) -> None:
        self.root, self.task, self.classes, self.threshold = root, task, classes, threshold
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.kept = 0
        self.folders = folder_names(classes)

    def add(self, prediction: Prediction, found: Mapping[str, Tensor], stem: str) -> None:
        """Add an image, unless its score is below the threshold."""
        name = stem + prediction.path.suffix.lower()
        if self.task == "classification":
            score, best = found["scores"].max(dim=-1)
            if float(score) < self.threshold:
                return
            place = self.root / "train" / self.folders[int(best)] / name
        elif self.task == "detection":
            number = len(self.images) + 1
            size = {"width": prediction.image.width, "height": prediction.image.height}
            self.images.append({"id": number, "file_name": name} | size)
            self.annotations += coco_annotations(found, number, len(self.annotations) + 1)
            place = self.root / "images" / name
        else:
            ids = found["ids"].int()
            ignored = _IGNORED if len(self.classes) <= _MOST_IN_BYTE else 65535
            ids = torch.where(found["confidence"] < self.threshold, ignored, ids)
            save_mask(_parent_made(self.root / "train" / "masks" / f"{stem}.png"), ids, len(self.classes))
            place = self.root / "train" / "images" / name
        self.kept += 1
        _bring(prediction.path, _parent_made(place))

    def close(self) -> None:
        """Write the lists that the format needs beside the images."""
        if self.task == "detection":
            content = coco_file(self.images, self.annotations, self.classes)
            write_text(self.root / "train.json", json.dumps(content) + "\n")
        elif self.task == "segmentation":
            write_text(self.root / "classes.txt", "".join(f"{name}\n" for name in self.classes))

    def options(self) -> list[str]:
        """Return the options of `diffkd fit` that read this set."""
        options = ["--data", _DATA[self.task], f"--data.root={self.root}", "--data.val_share=0.1"]
        if self.task == "segmentation":
            options.append("--data.classes=classes.txt")
            if len(self.classes) > _MOST_IN_BYTE:
                options.append("--data.ignore_index=65535")
        return options


def new_folder(out: Path) -> Path:
    """Create a folder to write into, before anything is computed.

    Raises:
        FileExistsError: if it is a file, or not empty.
        OSError: if it cannot be created or written.
    """
    if out.is_file():
        raise FileExistsError(f"{out} is a file; give a folder as --out")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give another --out, or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".write"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error.strerror}); give another --out") from error
    return out


def above(found: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Return the detections with at least a score, and with an extent."""
    sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
    kept = (found["scores"] >= threshold) & (sides > 0).all(dim=1)
    return {name: value[kept] for name, value in found.items()}


def coco_annotations(found: Mapping[str, Tensor], image: int, first: int) -> list[dict[str, Any]]:
    """Return detections as annotations of COCO with a "score".

    Args:
        found: "boxes" (n, 4) left, top, right, bottom in pixels, "scores" (n,), and "labels" (n,) from 1, which are the
            category ids.
        image: id of the image.
        first: id of the first annotation.
    """
    boxes = found["boxes"].double()
    sides = boxes[:, 2:] - boxes[:, :2]
    stated = torch.cat([boxes[:, :2], sides], dim=1).tolist()
    rows = zip(stated, found["labels"].tolist(), found["scores"].tolist(), strict=True)
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": label,
            "bbox": [round(value, 2) for value in box],
            "area": round(box[2] * box[3], 2),
            "iscrowd": 0,
            "score": round(score, 6),
        }
        for number, (box, label, score) in enumerate(rows, first)
    ]


def coco_file(
    images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> dict[str, Any]:
    """Return the content of a COCO file, whose category ids count from 1."""
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": list(images), "annotations": list(annotations), "categories": categories}


def save_mask(path: Path, ids: Tensor, classes: int) -> None:
    """Save class ids (H, W) as PNG: one byte a pixel with a palette, or 16 bits of grey for more than 255 classes."""
    values: npt.NDArray[Any] = ids.numpy()
    if classes > _MOST_IN_BYTE:
        Image.fromarray(values.astype(np.uint16)).save(path)
        return
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(palette(classes).tobytes() + bytes(3 * (256 - classes)))
    image.save(path)


def folder_names(classes: Sequence[str]) -> list[str]:
    """Return for each class a name that a folder can have on any system, and no other class has.

    >>> folder_names(["cat", "T-shirt/top", "../cat", ""])
    ['cat', 'T-shirt_top', '_cat', '_']
    """
    names = [re.sub(r'[\x00-\x1f/\\\\:*?"<>|]', "_", name.strip()).strip(". ") or "_" for name in classes]
    counts = Counter(name.casefold() for name in names)
    return [name if counts[name.casefold()] == 1 else f"{name}_{label}" for label, name in enumerate(names)]


def _parent_made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _bring(source: Path, target: Path) -> None:
    """Put an image at a place, as a second name of the same file where the disk allows that, or else as a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
