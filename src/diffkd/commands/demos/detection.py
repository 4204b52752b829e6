"""`diffkd demo --task detection`: distil the packaged detector into a smaller one, and draw the detections of each."""

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from diffkd.commands.compare import RECOMMENDED, compare, cores
from diffkd.commands.demos import finish, keep_recommended
from diffkd.commands.evaluate import data_of
from diffkd.export.student_file import find_weights, read_card
from diffkd.reports.predictions import Boxes, draw_boxes
from diffkd.reports.tables import Row
from diffkd.tasks.data_facts import facts_of
from diffkd.tasks.options import DetectionOptions
from diffkd.tasks.task_of_data import load
from diffkd.training.models import build_teacher

RECIPE = "scenes/detection"
METHODS = ("alone", "kd", "fitnet", "diffkd-ae", RECOMMENDED)
TEACHER = "scenes/detection-teacher.safetensors"
SHOWN = 5
"""Number of scenes in the figure."""
THRESHOLD = 0.4
"""Smallest score of a box in the figure."""


def detection_demo(out: Path, seeds: int, epochs: int | None, jobs: int | None, console: Console) -> list[Row]:
    """Train a small detector alone and with several methods on generated scenes, and compare.

    Scenes and teacher come with the package: nothing is downloaded. If interrupted and called again, it continues.

    Args:
        out: folder for the table, the figure `boxes.png`, the student of the recommended preset and all runs.
        seeds: runs of each method.
        epochs: length of each run; None: the recipe's.
        jobs: runs at the same time; None: one per core.
        console: console for progress messages.

    Returns:
        A row per method.
    """
    card = read_card(find_weights(TEACHER))
    console.print(
        f"detection: {card['model']} ({100 * card['metrics']['ap']:.1f} AP) teaches a smaller detector, "
        f"{len(METHODS)} methods, {seeds} seed(s) each, in {out}"
    )
    options = [] if epochs is None else [f"--epochs={epochs}"]
    methods = [f"detection/{method}" for method in METHODS]
    rows = compare(RECIPE, out, methods=methods, seeds=seeds, jobs=cores() if jobs is None else jobs, options=options)
    keep_recommended(out)
    picture = draw_detections(out)
    finish(out, console, str(out / "comparison.json"), picture)
    return rows


def draw_detections(out: Path) -> Path:
    """Draw evaluation scenes with the boxes of student alone, distilled student, teacher and ground truth.

    The first scenes with several objects that lie apart are drawn, then others. Of boxes that overlap by more than
    half, whatever their classes, the one with the highest score is drawn.

    Args:
        out: folder of a finished demonstration.

    Returns:
        The path of the picture.
    """
    card = read_card(out / "student.safetensors")
    data = data_of(card)
    facts = facts_of(data)
    options = DetectionOptions(**card["detection"])
    teacher, _ = build_teacher(read_card(find_weights(TEACHER))["model"], facts, weights=TEACHER, pretrained=False)
    detectors: dict[str, nn.Module] = {
        title: load(
            card["model"],
            facts,
            num_classes=None,
            in_channels=None,
            weights=out / method / "seed-0" / "student.safetensors",
            detection=options,
        )
        for title, method in (("student alone", "alone"), (f"student, {RECOMMENDED}", RECOMMENDED))
    }
    detectors["teacher"] = teacher
    images, targets = _clearest(data, SHOWN)
    with torch.no_grad():
        columns = {title: [_distinct(found) for found in model.eval()(images)] for title, model in detectors.items()}
    return draw_boxes(out / "boxes.png", images, {**columns, "truth": targets}, facts.classes, threshold=THRESHOLD)


def _distinct(found: Boxes) -> Boxes:
    """Suppress the lower score of boxes that overlap by more than half, whose classes a detector keeps apart."""
    kept = nms(found["boxes"], found["scores"], 0.5)
    return {name: value[kept] for name, value in found.items()}


def _clearest(data: LightningDataModule, count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return evaluation images and their targets: first those of several objects whose boxes do not overlap."""
    images: list[Tensor] = []
    targets: list[dict[str, Tensor]] = []
    for some, theirs, _ in data.val_dataloader():
        images, targets = [*images, *some], [*targets, *theirs]
    order = sorted(range(len(images)), key=lambda index: not _lie_apart(targets[index]["boxes"]))[:count]
    return [images[index] for index in order], [targets[index] for index in order]


def _lie_apart(boxes: Tensor) -> bool:
    """Whether there are several boxes (n, 4) and none of them overlaps another by more than a twentieth."""
    return len(boxes) > 1 and bool((box_iou(boxes, boxes).fill_diagonal_(0) < 0.05).all())
