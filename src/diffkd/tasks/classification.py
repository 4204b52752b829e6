"""Image classification: cross entropy, top-1 and top-5 accuracy."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision

from diffkd.data.classification.augmentation import mix
from diffkd.features.layout import select_tensor
from diffkd.files.history import Row
from diffkd.methods.inputs import like_parameters
from diffkd.tasks.task import TASK, Step

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Classification:
    """Image classification; batches are `(images (B, C, H, W), labels (B,), indices (B,))`.

    With `multi_label` an image may have several classes: labels are (B, K) zeros and ones, the loss is the binary cross
    entropy of each class, and the metric is the mean average precision.

    Args:
        num_classes: K, length of the student's output.
        label_smoothing: share of the label that is spread over all classes.
        mixup, cutmix: alpha of Mixup and CutMix, 0 is off (:func:`~diffkd.data.classification.augmentation.mix`).
        classes: names of the K classes, for messages.
        multi_label: see above.

    Raises:
        ValueError: if `label_smoothing` is not in [0, 1).
    """

    num_classes: int
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    classes: tuple[str, ...] = ()
    multi_label: bool = False

    name = "classification"

    @property
    def headlines(self) -> tuple[str, ...]:
        """Names of the metrics that are shown; the first selects the best epoch."""
        return ("map",) if self.multi_label else ("top1", "top5")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that may be measured."""
        if self.multi_label:
            return ("map", "loss")
        return ("top1", "top5", "loss") if self.num_classes > 5 else ("top1", "loss")

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")

    def step(self, batch: Batch, seed: int) -> Step:
        """Apply Mixup and CutMix, if enabled."""
        images, labels, indices = batch
        targets = labels
        if self.mixup or self.cutmix:
            images, targets = mix(images, labels, self.num_classes, mixup=self.mixup, cutmix=self.cutmix, seed=seed)
        return Step(images, images, targets, {"labels": labels, "indices": indices})

    def losses(self, output: Any, step: Step) -> dict[str, Tensor]:
        """Return the cross entropy with the labels, the binary one with `multi_label`, as a mean."""
        if self.multi_label:
            smooth = self.label_smoothing
            targets = step.targets * (1 - smooth) + smooth / 2
            return {TASK: F.binary_cross_entropy_with_logits(logits_of(output), targets.to(logits_of(output).dtype))}
        return {TASK: F.cross_entropy(logits_of(output), step.targets, label_smoothing=self.label_smoothing)}

    def meter(self, device: torch.device, *, last: bool = False) -> "Accuracy | Precision":
        """Return the meter of accuracy, or of average precision, and cross entropy."""
        return Precision(self.num_classes, device) if self.multi_label else Accuracy(self.num_classes, device)

    def judge(self, teacher: Callable[[Any], Any], batch: Batch) -> tuple[float, float] | None:
        """Return a teacher's accuracy on a batch and that by chance; None if its number of classes differs.

        With `multi_label` it is the share of images that have the class of the highest score.
        """
        images, labels, _ = batch
        logits = logits_of(teacher(images))
        if logits.shape[1] != self.num_classes:
            return None
        if self.multi_label:
            best = labels.gather(1, logits.argmax(dim=1, keepdim=True))
            return float(best.float().mean()), float(labels.float().mean())
        return float((logits.argmax(dim=1) == labels).float().mean()), 1 / self.num_classes

    def confusions(self, teacher: Callable[[Any], Any], batch: Batch) -> str | None:
        """Return evidence in one line that a teacher has its classes in another order; None if there is none."""
        images, labels, _ = batch
        logits = logits_of(teacher(images))
        if self.multi_label or logits.shape[1] != self.num_classes or len(self.classes) != self.num_classes:
            return None
        return other_order(logits.argmax(dim=1).tolist(), labels.tolist(), self.classes)


def class_scores(logits: Tensor, *, multi_label: bool) -> Tensor:
    """Return the probability of each class from logits (..., K): of one class an image, or of each class for itself."""
    return logits.float().sigmoid() if multi_label else logits.float().softmax(dim=-1)


def other_order(answers: Sequence[int], labels: Sequence[int], classes: Sequence[str]) -> str | None:
    """Describe confusions of a teacher that suggest another order of its classes, None if there are none.

    Args:
        answers: its predicted class for each of n images.
        labels: their labels.
        classes: names, in the order of the data.
    """
    right = sum(answer == label for answer, label in zip(answers, labels, strict=True)) / max(1, len(labels))
    taken: dict[int, Counter[int]] = {}
    for answer, label in zip(answers, labels, strict=True):
        taken.setdefault(label, Counter())[answer] += 1
    swapped = []
    for label, counts in taken.items():
        answer, count = counts.most_common(1)[0]
        if answer != label and count >= 2 and 2 * count > counts.total():
            swapped.append((count / counts.total(), count, label, answer, counts.total()))
    swapped.sort(reverse=True)
    pairs = ", ".join(
        f"{classes[label]!r} for {classes[answer]!r} ({count} of {total})"
        for _, count, label, answer, total in swapped[:3]
    )
    orders = {
        "numeric": sorted(classes, key=lambda name: [int(part) if part.isdigit() else part for part in _numbers(name)]),
        "alphabetical, upper and lower case alike,": sorted(classes, key=str.casefold),
        "alphabetical, upper case first,": sorted(classes),
    }
    for kind, names in orders.items():
        place = {name: index for index, name in enumerate(classes)}
        meant = [place[names[answer]] for answer in answers]
        share = sum(answer == label for answer, label in zip(meant, labels, strict=True)) / max(1, len(labels))
        if share > right + max(0.05, 1.5 / max(1, len(labels))):
            begins = f"it takes {pairs}; " if pairs else ""
            return (
                f"{begins}with its classes in {kind} order it would be {100 * share:.1f} % right: give them as "
                "--teacher_options.classes"
            )
    # Classes that are each predicted as one other, which is predicted as one of them.
    goals = {answer for *_, answer, _ in swapped}
    if len(swapped) >= 2 and all(label in goals for _, _, label, _, _ in swapped):
        return f"it takes {pairs}: if its classes are in another order, give them as --teacher_options.classes"
    return None


def _numbers(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


class Accuracy:
    """Measures "top1", with more than five classes "top5", both in 0..1, and "loss", the mean cross entropy.

    Args:
        num_classes: K.
        device: where the batches are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        # Without validation, which waits for the device; labels were checked when the data were read.
        accuracy = partial(MulticlassAccuracy, num_classes, average="micro", validate_args=False)
        self.metrics: dict[str, Metric] = {"top1": accuracy(), "loss": MeanMetric(nan_strategy="disable")}
        if num_classes > 5:
            self.metrics["top5"] = accuracy(top_k=5)
        for metric in self.metrics.values():
            metric.to(device)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Count the hits of a batch."""
        images, labels, _ = batch
        # The EMA is in float32, whatever the student's dtype.
        logits = logits_of(model(like_parameters(images, model)))
        for name in ("top1", "top5"):
            if name in self.metrics:
                self.metrics[name].update(logits, labels)
        self.metrics["loss"].update(F.cross_entropy(logits.float(), labels, reduction="none"))

    def compute(self) -> Row:
        """Return the metrics over all images of all ranks, and reset."""
        return computed(self.metrics)


class Precision:
    """Measures "map", the mean over classes of the average precision, in 0..1, and "loss", the binary cross entropy.

    Classes that no image has are left out of the mean.

    Args:
        num_classes: K.
        device: where the batches are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        each = MultilabelAveragePrecision(num_classes, average="none", validate_args=False)
        self.metrics: dict[str, Metric] = {"map": each, "loss": MeanMetric(nan_strategy="disable")}
        for metric in self.metrics.values():
            metric.to(device)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Keep the scores of a batch."""
        images, labels, _ = batch
        logits = logits_of(model(like_parameters(images, model))).float()
        self.metrics["map"].update(logits, labels)
        loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        self.metrics["loss"].update(loss.mean(dim=1))

    def compute(self) -> Row:
        """Return the metrics over all images of all ranks, and reset."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No positive samples")
            every = self.metrics["map"].compute()  # 0 for a class that no image has, and above it for all others
        present = every[every > 0]
        row = {"map": float(present.mean()) if len(present) else 0.0}
        row["loss"] = float(self.metrics["loss"].compute())
        for metric in self.metrics.values():
            metric.reset()
        return row


def computed(metrics: dict[str, Metric]) -> Row:
    """Return the values of metrics, and reset them."""
    row = {name: float(metric.compute()) for name, metric in metrics.items()}
    for metric in metrics.values():
        metric.reset()
    return row


def logits_of(output: Any) -> Tensor:
    """Return the class scores (B, K) in a model's output: a tensor, a tuple, a mapping, or an object with `logits`.

    Raises:
        TypeError: if there are none.
    """
    tensor = select_tensor(output)
    if tensor is None or tensor.ndim != 2:
        shape = "no tensor" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
        raise TypeError(f"the student returned {shape}; a classifier must return logits (B, classes)")
    return tensor
