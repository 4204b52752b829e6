"""What a student gets wrong on its evaluation images: the worst of them, and which classes it takes for which."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou

from diffkd.inference.pictures import classes_found, draw_prediction, side_by_side, to_image
from diffkd.inference.results import above
from diffkd.methods.inputs import like_parameters
from diffkd.models.segmenters.any_size import AnySize, upsample
from diffkd.tasks.classification import class_scores, logits_of
from diffkd.tasks.data_facts import DataFacts

_IOU, _SCORE = 0.5, 0.3
_SEVERAL = 0.5  # score of the classes of an image that may have several


@dataclass
class Mistakes:
    """What was found on some evaluation images.

    Attributes:
        images: their number.
        complete: whether these are all images.
        confusion: (K, K) counts by true class (rows) and predicted class: images, or pixels for segmentation. For
            detection (K + 1, K + 1) boxes with a score of at least 0.3, matched at an IoU of 0.5; the last row are
            boxes that are no object, the last column objects that were missed. Where an image may have several classes
            (K, 2, 2), counts of images by class: whether they have it (rows), and whether they get a score of at least
            0.5 for it (columns).
        worst: the worst images, the worst first: a picture of each and a line about it.
    """

    images: int
    complete: bool
    confusion: Tensor
    worst: list[tuple[Image.Image, str]] = field(default_factory=list)


def find_mistakes(
    model: nn.Module, facts: DataFacts, batches: Iterable[Any], *, shown: int = 12, limit: int = 5000
) -> Mistakes:
    """Run a model, which is in evaluation mode, on evaluation images.

    Args:
        model: the student.
        facts: of the data.
        batches: as for the task, on the model's device.
        shown: number of worst images to keep.
        limit: number of images to look at.

    Returns:
        What was found.
    """
    look = {"classification": _classified, "detection": _detected, "segmentation": _segmented}[facts.task]
    size = facts.num_classes + (facts.task == "detection")
    shape: tuple[int, ...] = (size, size)
    if facts.multi_label:
        look, shape = _labelled, (size, 2, 2)
    found = Mistakes(0, True, torch.zeros(shape, dtype=torch.int64))
    worst: list[tuple[float, int, tuple[Image.Image, str]]] = []
    order = count()
    if facts.task == "segmentation":
        model = AnySize(model).eval()
    with torch.no_grad():
        for batch in batches:
            if found.images >= limit:
                found.complete = False
                break
            found.images += len(batch[0])
            for badness, make in look(model, facts, batch, found.confusion):
                # A picture is made only of an image that is among the worst so far.
                if badness > 0 and (len(worst) < shown or badness > worst[0][0]):
                    entry = (badness, -next(order), make())
                    (heapq.heappush if len(worst) < shown else heapq.heapreplace)(worst, entry)
    found.worst = [picture for *_, picture in sorted(worst, key=lambda one: one[:2], reverse=True)]
    return found


def _classified(model: nn.Module, facts: DataFacts, batch: Any, confusion: Tensor) -> Iterable[tuple[float, Any]]:
    images, labels, indices = batch
    scores = class_scores(logits_of(model(like_parameters(images, model))), multi_label=False).cpu()
    labels = labels.cpu()
    confusion += torch.bincount(
        labels * facts.num_classes + scores.argmax(dim=1), minlength=facts.num_classes**2
    ).reshape(facts.num_classes, -1)
    for image, label, index, row in zip(images, labels.tolist(), indices.tolist(), scores, strict=True):
        best = int(row.argmax())

        def make(
            image: Tensor = image, label: int = label, index: int = index, row: Tensor = row, best: int = best
        ) -> Any:
            line = (
                f"image {index}: {facts.classes[best]} {100 * float(row[best]):.0f} %, "
                f"is {facts.classes[label]} {100 * float(row[label]):.0f} %"
            )
            return draw_prediction(to_image(image, facts.mean, facts.std), {}, facts.classes), line

        yield (1 - float(row[label]) if best != label else 0.0), make


def _labelled(model: nn.Module, facts: DataFacts, batch: Any, confusion: Tensor) -> Iterable[tuple[float, Any]]:
    """Yield images that may have several classes; how bad they are is their binary cross entropy."""
    images, labels, indices = batch
    logits = logits_of(model(like_parameters(images, model))).float().cpu()
    truth, scores = labels.cpu().bool(), class_scores(logits, multi_label=True)
    taken = scores >= _SEVERAL
    for has in (False, True):
        for predicted in (False, True):
            confusion[:, int(has), int(predicted)] += ((truth == has) & (taken == predicted)).sum(dim=0)
    losses = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none").mean(dim=1)
    right = (truth == taken).all(dim=1)
    rows = zip(images, truth, scores, indices.tolist(), losses.tolist(), right.tolist(), strict=True)
    for image, own, row, index, loss, is_right in rows:

        def make(
            image: Tensor = image, own: Tensor = own, row: Tensor = row, index: int = index, loss: float = loss
        ) -> Any:
            names = ", ".join(facts.classes[label] for label in own.nonzero()[:, 0].tolist()) or "no class"
            line = f"image {index}: {classes_found(row, facts.classes, _SEVERAL)}, is {names} (loss {loss:.3f})"
            return draw_prediction(to_image(image, facts.mean, facts.std), {}, facts.classes), line

        yield (0.0 if is_right else loss), make


def _segmented(model: nn.Module, facts: DataFacts, batch: Any, confusion: Tensor) -> Iterable[tuple[float, Any]]:
    images, masks, indices = batch
    logits = upsample(model(like_parameters(images, model)).float(), (masks.shape[1], masks.shape[2]))
    for image, mask, index, ids in zip(images, masks.cpu(), indices.tolist(), logits.argmax(dim=1).cpu(), strict=True):
        counts = (mask != facts.ignore_index) & (mask >= 0) & (mask < facts.num_classes)
        confusion += torch.bincount(
            mask[counts] * facts.num_classes + ids[counts], minlength=facts.num_classes**2
        ).reshape(facts.num_classes, -1)
        wrong = float((ids != mask)[counts].float().mean()) if counts.any() else 0.0

        def make(
            image: Tensor = image, mask: Tensor = mask, index: int = index, ids: Tensor = ids, wrong: float = wrong
        ) -> Any:
            shown = to_image(image, facts.mean, facts.std).resize((mask.shape[1], mask.shape[0]))
            truth = torch.where(mask == facts.ignore_index, -1, mask)
            picture = side_by_side(
                [
                    draw_prediction(shown, {"ids": ids}, facts.classes),
                    draw_prediction(shown, {"ids": truth}, facts.classes),
                ]
            )
            return picture, f"image {index}: {100 * wrong:.1f} % of the pixels wrong; left predicted, right true"

        yield wrong, make


def _detected(model: nn.Module, facts: DataFacts, batch: Any, confusion: Tensor) -> Iterable[tuple[float, Any]]:
    images, targets, indices = batch
    outputs = model([like_parameters(image, model) for image in images])
    for image, target, index, output in zip(images, targets, indices.tolist(), outputs, strict=True):
        found = above({name: output[name].detach().cpu() for name in ("boxes", "scores", "labels")}, _SCORE)
        real = target.get("iscrowd", torch.zeros_like(target["labels"])).cpu() == 0
        truth = {name: target[name].cpu()[real] for name in ("boxes", "labels")}
        hits = _matched(found, truth, confusion)
        objects = len(truth["labels"]) + len(found["labels"])
        badness = 1 - 2 * hits / objects if objects else 0.0

        def make(
            image: Tensor = image, index: int = index, found: Any = found, truth: Any = truth, hits: int = hits
        ) -> Any:
            shown = to_image(image, facts.mean, facts.std)
            picture = side_by_side(
                [draw_prediction(shown, found, facts.classes), draw_prediction(shown, truth, facts.classes)]
            )
            wrong = len(found["labels"]) - hits
            line = f"image {index}: {hits} of {len(truth['labels'])} objects found, {wrong} wrong boxes"
            return picture, f"{line}; left found, right true"

        yield badness, make


def _matched(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], confusion: Tensor) -> int:
    """Match boxes of any class in the order of their scores, count the pairs of classes, and return the hits."""
    none = confusion.shape[0] - 1
    overlap = box_iou(found["boxes"].float(), truth["boxes"].float())
    free = torch.ones(len(truth["labels"]), dtype=torch.bool)
    hits = 0
    for place in found["scores"].argsort(descending=True).tolist():
        label = int(found["labels"][place]) - 1
        near = overlap[place] * free
        best = int(near.argmax()) if len(near) else 0
        if len(near) and float(near[best]) >= _IOU:
            free[best] = False
            true = int(truth["labels"][best]) - 1
            hits += true == label
            confusion[true, label] += 1
        else:
            confusion[none, label] += 1
    for label in truth["labels"][free].tolist():
        confusion[label - 1, none] += 1
    return hits


def confused(confusion: Tensor, names: Sequence[str], most: int = 15) -> list[tuple[str, str, int, float]]:
    """Return the most frequent confusions: true class, predicted class, count, and share of the true class.

    >>> confused(torch.tensor([[8, 2], [0, 10]]), ["cat", "dog"])
    [('cat', 'dog', 2, 0.2)]
    """
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    totals = confusion.sum(dim=1)
    rows = []
    for place in wrong.flatten().argsort(descending=True, stable=True)[:most].tolist():
        true, taken = divmod(place, len(wrong))
        number = int(wrong[true, taken])
        if number:
            rows.append((names[true], names[taken], number, number / int(totals[true])))
    return rows


def recalls(confusion: Tensor) -> np.ndarray[Any, Any]:
    """Return the shares of each true class that were predicted as each class, (K, K); NaN for absent classes."""
    counts = confusion.double().numpy()
    with np.errstate(invalid="ignore"):
        shares: np.ndarray[Any, Any] = counts / counts.sum(axis=1, keepdims=True)
    return shares
