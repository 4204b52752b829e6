"""Object detection: the detector's own losses, COCO average precision."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torchmetrics.detection import MeanAveragePrecision

from diffkd.files.history import Row
from diffkd.methods.inputs import like_parameters
from diffkd.models.detectors.from_transformers import TransformersDetector
from diffkd.models.extras import require
from diffkd.tasks.distributed import several_processes
from diffkd.tasks.task import TASK, Step

Batch = tuple[list[Tensor], list[dict[str, Tensor]], Tensor]

# The twelve metrics of the COCO evaluation: their names here, and those of torchmetrics.
COCO_NUMBERS = {
    "ap": "map",
    "ap50": "map_50",
    "ap75": "map_75",
    "ap_small": "map_small",
    "ap_medium": "map_medium",
    "ap_large": "map_large",
    "ar1": "mar_1",
    "ar10": "mar_10",
    "ar100": "mar_100",
    "ar_small": "mar_small",
    "ar_medium": "mar_medium",
    "ar_large": "mar_large",
}


@dataclass(frozen=True)
class Detection:
    """Object detection; batches are `(images, targets, indices)`.

    `images` is a list of B tensors (C, H, W) in [0, 1], each of its own size; `targets` a list of B mappings with
    "boxes" (n, 4), left, top, right and bottom in pixels, "labels" (n,) in 1..K, and for the evaluation "area" (n,) and
    "iscrowd" (n,). The student has the interface of torchvision's detectors: `model(images, targets)` returns losses.

    Args:
        classes: names of the K classes; label 1 is the first.

    Raises:
        ModuleNotFoundError: if faster-coco-eval, which computes the average precision, is not installed.
    """

    classes: tuple[str, ...]

    name = "detection"
    headlines = ("ap", "ap50")
    metrics = tuple(COCO_NUMBERS)

    def __post_init__(self) -> None:
        # Checked early: torchmetrics would raise only after the first epoch.
        require("faster_coco_eval", "detection", "the average precision of detectors")

    def step(self, batch: Batch, seed: int) -> Step:
        """Return images and targets as the student's input."""
        images, targets, indices = batch
        return Step((images, targets), images, targets, {"indices": indices})

    def losses(self, output: Any, step: Step) -> dict[str, Tensor]:
        """Return the detector's own losses by name.

        Raises:
            TypeError: if the student returned no losses.
        """
        if not isinstance(output, Mapping) or not output:
            raise TypeError(
                f"the student returned {type(output).__name__}; a detector must return its losses by name when it is "
                "called with images and targets in training mode"
            )
        return {f"{TASK}/{name.removeprefix('loss_')}": loss for name, loss in output.items()}

    def meter(self, device: torch.device, *, last: bool = False) -> "CocoPrecision":
        """Return the meter of average precision and recall."""
        return CocoPrecision(device)

    def judge(self, teacher: Callable[[Any], Any], batch: Batch) -> tuple[float, float] | None:
        """Return a teacher's average precision at an IoU of 0.5 on a batch, and 0 as chance; None if classes differ."""
        if classes_of(teacher) not in (None, len(self.classes)):
            return None
        images, targets, _ = batch
        meter = CocoPrecision(images[0].device)
        meter.take(teacher(images), targets)
        return meter.compute()["ap50"], 0.0


def classes_of(detector: object) -> int | None:
    """Return the number of classes of a detector without background; None if unknown."""
    if isinstance(detector, TransformersDetector):
        return detector.num_classes
    scores = getattr(getattr(getattr(detector, "roi_heads", None), "box_predictor", None), "cls_score", None)
    count = getattr(scores, "out_features", None)
    if count is None:
        head = getattr(getattr(detector, "head", None), "classification_head", None)
        count = getattr(head, "num_classes", None)
    return count - 1 if isinstance(count, int) else None  # torchvision counts the background


class CocoPrecision:
    """Measures the twelve metrics of the COCO evaluation, all in 0..1; those of sizes that do not occur are left out.

    "ap", "ap50" and "ap75": average precision over IoU thresholds of 0.5 to 0.95, at 0.5 and at 0.75; "ap_small",
    "ap_medium", "ap_large": by area of the object, up to 32^2, up to 96^2 and above; "ar1", "ar10", "ar100": recall
    with 1, 10 and 100 detections per image; "ar_small", "ar_medium", "ar_large" (Lin et al., *Microsoft COCO*, 2014).

    Args:
        device: where the batches are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._images: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # detections and targets

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Run the model on a batch and add its detections."""
        images, targets, _ = batch
        self.take(model([like_parameters(image, model) for image in images]), targets)

    def take(self, detections: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> None:
        """Add the detections ("boxes", "labels", "scores") and targets of some images."""
        for found, there in zip(detections, targets, strict=True):
            self._images.append(
                (
                    {name: found[name].detach().cpu() for name in ("boxes", "scores", "labels")},
                    {name: value.cpu() for name, value in there.items()},
                )
            )

    def compute(self) -> Row:
        """Return the metrics over all images of all ranks, and reset."""
        images, self._images = self._images, []
        if several_processes():
            # The metric's own gathering requires equal numbers of images on each rank.
            shares: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(shares, images)
            images = [image for share in shares for image in share]
        if all("image_id" in there for _, there in images):
            # The order of the COCO evaluation, which breaks ties of scores.
            images.sort(key=lambda image: int(image[1]["image_id"]))
        # COCO's thresholds in float64; the default ones are rounded to float32, so that a recall of 0.2 misses its own.
        metric = MeanAveragePrecision(
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
        metric.warn_on_many_detections = False
        wanted = ("boxes", "labels", "area", "iscrowd")
        metric.update(
            [{name: value.float() if name != "labels" else value for name, value in one.items()} for one, _ in images],
            [{name: one[name] for name in wanted if name in one} for _, one in images],
        )
        found = metric.compute()
        values = {name: float(found[theirs]) for name, theirs in COCO_NUMBERS.items()}
        if values["ap"] < 0:
            return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}  # no objects at all
        return {name: value for name, value in values.items() if value >= 0}
