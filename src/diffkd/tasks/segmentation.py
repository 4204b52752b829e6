"""Semantic segmentation: cross entropy by pixel, mean intersection over union, sliding windows."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from diffkd.features.layout import select_tensor
from diffkd.files.history import Row
from diffkd.methods.inputs import like_parameters
from diffkd.models.segmenters.any_size import AnySize, class_map, upsample
from diffkd.tasks.options import DEFAULT_SEGMENTATION, SegmentationOptions
from diffkd.tasks.task import TASK, Step


@torch.no_grad()
def sliding_window(
    model: Callable[[Tensor], Any],
    images: Tensor,
    *,
    window: tuple[int, int],
    stride: tuple[int, int],
    num_classes: int,
) -> Tensor:
    """Segment images window by window and average the logits where windows overlap.

    Windows begin every `stride` pixels; the last of a row or column is shifted back so that it ends with the image. A
    side of an image that is shorter than the window is taken whole. Logits are averaged, not probabilities, so that the
    result can be used as the model's own. No gradients are recorded.

    Args:
        model: maps images (B, C, h, w) to logits (B, K, h', w') or what holds them as "out" or `logits`; they are
            up-sampled to the window. It must take windows of the given size, and smaller ones if images are smaller:
            :class:`diffkd.models.AnySize` does.
        images: (B, C, H, W).
        window: height and width in pixels.
        stride: steps down and to the right in pixels, at most the window's.
        num_classes: K.

    Returns:
        Logits (B, K, H, W), at least in float32. If all windows agree on a pixel, the value is exactly theirs.

    Raises:
        ValueError: if `window` or `stride` would leave pixels out, the images are not (B, C, H, W) with at least one
            pixel, or the model returns another number of classes.
    """
    for name, sides in (("window", window), ("stride", stride)):
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"{name} {tuple(sides)} covers nothing: give height and width of at least 1 pixel")
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(
            f"stride {tuple(stride)} steps over pixels between windows of {tuple(window)}: "
            "make it no larger than the window on either side"
        )
    if images.ndim != 4 or 0 in images.shape[-2:]:
        raise ValueError(f"images of shape {tuple(images.shape)} cannot be segmented: give (B, C, H, W)")
    batch, _, height, width = images.shape
    high, wide = min(window[0], height), min(window[1], width)
    mean: Tensor | None = None
    count = torch.zeros((height, width), device=images.device)
    for top in _starts(height, high, stride[0]):
        for left in _starts(width, wide, stride[1]):
            rows, columns = slice(top, top + high), slice(left, left + wide)
            logits = upsample(class_map(model(images[..., rows, columns])), (high, wide))
            if logits.shape[1] != num_classes:
                raise ValueError(
                    f"the model returned {logits.shape[1]} classes, and num_classes is {num_classes}: make them equal"
                )
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if mean is None:
                mean = logits.new_zeros((batch, num_classes, height, width))
            count[rows, columns] += 1
            before = mean[..., rows, columns]
            # Unlike a sum, the running mean of equal logits is exact, for infinite ones too.
            moved = torch.where(count[rows, columns] == 1, logits, before + (logits - before) / count[rows, columns])
            mean[..., rows, columns] = torch.where(logits == before, before, moved)
    assert mean is not None  # there is at least one window
    return mean


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Return the starts of windows along a side of `size` pixels; the last window ends with the side."""
    last = size - window
    return [*range(0, last, stride), last]


Batch = tuple[Tensor, Tensor, Tensor]
NO_CLASS = -1
"""The label that replaces the ignored id for methods, since that id may be one of the classes'."""


@dataclass(frozen=True)
class Segmentation:
    """Semantic segmentation; batches are `(images (B, C, H, W), masks (B, H, W), indices (B,))`.

    The loss is the mean cross entropy over all pixels that are not ignored, 0 if there are none. Images of any size are
    padded to a size that the models can take; the added pixels are ignored.

    Args:
        classes: names of the K classes.
        ignore_index: id in masks that is ignored in loss and metrics.
        multiple: images are padded to multiples of this in training.
        options: the :class:`~diffkd.tasks.options.SegmentationOptions`.
    """

    classes: tuple[str, ...]
    ignore_index: int = 255
    multiple: int = 1
    options: SegmentationOptions = DEFAULT_SEGMENTATION

    name = "segmentation"
    headlines = ("miou", "pixel_accuracy")
    metrics = ("miou", "pixel_accuracy", "loss")

    def step(self, batch: Batch, seed: int) -> Step:
        """Pad the images to a size that the models can take."""
        images, masks, indices = batch
        down, right = (-side % self.multiple for side in masks.shape[1:])
        if down or right:
            images = F.pad(images, (0, right, 0, down))
            masks = F.pad(masks, (0, right, 0, down), value=self.ignore_index)
        # For methods an ignored pixel has no class, whatever its id in the masks.
        labels = masks.masked_fill(masks == self.ignore_index, NO_CLASS)
        return Step(images, images, masks, {"labels": labels, "indices": indices})

    def losses(self, output: Any, step: Step) -> dict[str, Tensor]:
        """Return the cross entropy of the class map, and of the auxiliary one if it exists and has a weight."""
        maps = {TASK: class_map(output, len(self.classes))}
        auxiliary = output.get("aux") if isinstance(output, dict) else None
        if auxiliary is not None and self.options.auxiliary_weight:
            maps[f"{TASK}/auxiliary"] = auxiliary
        factors = {TASK: 1.0, f"{TASK}/auxiliary": self.options.auxiliary_weight}
        return {name: factors[name] * self._cross_entropy(scores, step.targets) for name, scores in maps.items()}

    def meter(self, device: torch.device, *, last: bool = False) -> "Overlap":
        """Return the meter of IoU and accuracy."""
        return Overlap(self.classes, self.ignore_index, self.options, device)

    def judge(self, teacher: Callable[[Any], Any], batch: Batch) -> tuple[float, float] | None:
        """Return a teacher's pixel accuracy on a batch and that by chance; None if its number of classes differs."""
        step = self.step(batch, 0)
        scores = select_tensor(teacher(step.inputs))
        if scores is None or scores.ndim != 4 or scores.shape[1] != len(self.classes):
            return None
        counts = step.targets != self.ignore_index
        hits = upsample(scores, (step.targets.shape[1], step.targets.shape[2])).argmax(dim=1) == step.targets
        return float((hits & counts).sum() / counts.sum().clamp_min(1)), 1 / len(self.classes)

    def _cross_entropy(self, scores: Tensor, masks: Tensor) -> Tensor:
        full = upsample(scores.float(), (masks.shape[1], masks.shape[2]))
        total = F.cross_entropy(full, masks, ignore_index=self.ignore_index, reduction="sum")
        return total / (masks != self.ignore_index).sum().clamp_min(1)


class Overlap:
    """Measures "miou", "pixel_accuracy" and "iou/CLASS" over all pixels of the data set, and "loss" over images.

    The intersection over union of a class is computed over the whole data set, not averaged over batches. Classes that
    are neither in the masks nor in the predictions have none and are left out of the mean, and so is an ignored class.
    If all pixels are ignored, all metrics are 0, with a warning.

    Args:
        classes: names of the K classes.
        ignore_index: id in masks that is ignored.
        options: whether windows slide over the images.
        device: where the batches are.
    """

    def __init__(
        self, classes: tuple[str, ...], ignore_index: int, options: SegmentationOptions, device: torch.device
    ) -> None:
        self.classes, self.ignore_index, self.options = classes, ignore_index, options
        self.counts = MulticlassConfusionMatrix(len(classes), ignore_index=ignore_index, validate_args=False).to(device)
        self.loss = MeanMetric(nan_strategy="ignore").to(device)
        self._whole: dict[int, AnySize] = {}

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Count the pixels of a batch."""
        images, masks, _ = batch
        if id(model) not in self._whole:
            self._whole[id(model)] = AnySize(model)
        whole = self._whole[id(model)].eval()
        images = like_parameters(images, model)
        if self.options.window is None:
            scores = whole(images)
        else:
            scores = sliding_window(
                whole,
                images,
                window=self.options.window,
                stride=self.options.stride,
                num_classes=len(self.classes),
            )
        # At the size of the masks, which may be larger than the images.
        scores = upsample(scores.float(), (masks.shape[1], masks.shape[2]))
        self.counts.update(scores.argmax(dim=1), masks)
        each = F.cross_entropy(scores, masks, ignore_index=self.ignore_index, reduction="none")
        valid = (masks != self.ignore_index).flatten(1).sum(dim=1)
        self.loss.update(each.flatten(1).sum(dim=1) / valid)  # NaN if all pixels are ignored; the metric skips it

    def compute(self) -> Row:
        """Return the metrics over all pixels of all ranks, and reset."""
        counts = self.counts.compute().double().cpu()
        row = overlap(counts, self.classes, self.ignore_index)
        if counts.any():
            row["loss"] = float(self.loss.compute())
        else:
            row["loss"] = 0.0
            warnings.warn(
                f"every pixel of the evaluation set is ignored (id {self.ignore_index}): nothing was measured. Are its "
                "masks those of a test set without labels?",
                stacklevel=2,
            )
        self.counts.reset()
        self.loss.reset()
        return row


def overlap(counts: Tensor, classes: tuple[str, ...], ignore_index: int | None = None) -> Row:
    """Return "miou", "pixel_accuracy" and "iou/CLASS" from a confusion matrix.

    Args:
        counts: (K, K) pixels by true class (rows) and predicted class (columns).
        classes: K names; in names of metrics "_" replaces blanks, commas and slashes, and if two become equal, the
            number of the class is appended.
        ignore_index: id without pixels; if it is one of the classes, that one has no intersection over union.

    >>> overlap(torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]), ("sky", "road", "car"))["iou/road"]
    0.75
    """
    hits = counts.diagonal()
    union = counts.sum(dim=0) + counts.sum(dim=1) - hits
    if ignore_index is not None and 0 <= ignore_index < len(classes):
        union[ignore_index] = 0  # a prediction of it still counts as a miss of the true class
        hits = hits.index_fill(0, torch.tensor(ignore_index), 0)
    shares = hits / union  # NaN for classes that occur nowhere
    row = {
        "miou": float(shares.nanmean()) if union.any() else 0.0,
        "pixel_accuracy": float(hits.sum() / counts.sum().clamp_min(1)),
    }
    names = [re.sub(r"[\s,/]+", "_", name) for name in classes]
    # "traffic light" and "traffic_light" stay distinct.
    names = [name if names.count(name) == 1 else f"{name}_{label}" for label, name in enumerate(names)]
    each = zip(names, shares.tolist(), union.tolist(), strict=True)
    return row | {f"iou/{name}": share for name, share, pixels in each if pixels}
