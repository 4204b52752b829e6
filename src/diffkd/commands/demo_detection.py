"""`diffkd demo --task detection`: distil the packaged detector into a smaller one, and draw the detections of each."""

import shutil
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import Tensor, nn

from diffkd.commands.compare import compare, cores
from diffkd.commands.evaluate import data_of
from diffkd.commands.report import write_report_of
from diffkd.export.student_file import find_weights, read_card
from diffkd.reports.predictions import draw_boxes
from diffkd.reports.tables import Row
from diffkd.tasks.data_facts import facts_of
from diffkd.tasks.options import DetectionOptions
from diffkd.tasks.task_of_data import load
from diffkd.training.models import build_teacher

RECIPE = "scenes/detection"
METHODS = ("alone", "fitnet", "diffkd-ae")  # with autoencoder, since the scale of its teacher's features is far from 1
TEACHER = "scenes/detection-teacher.safetensors"
SHOWN = 5


def detection_demo(out: Path, seeds: int, epochs: int | None, jobs: int | None, console: Console) -> list[Row]:
    """Train a small detector alone, with FitNet and with DiffKD on generated scenes, and compare.

    Scenes and teacher come with the package: nothing is downloaded. If interrupted and called again, it continues.

    Args:
        out: folder for the table, the figure `boxes.png`, the DiffKD student and all runs.
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
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(out / METHODS[-1] / "seed-0" / f"student{suffix}", out / f"student{suffix}")
    picture = draw_detections(out)
    write_report_of(out, tell=str)  # again, with the picture
    console.print(f"table   {out / 'comparison.json'}\npicture {picture}", soft_wrap=True)
    console.print(
        f"The student of DiffKD is a plain model now. Try:\ndiffkd test {out / 'student.safetensors'}", soft_wrap=True
    )
    return rows


def draw_detections(out: Path) -> Path:
    """Draw evaluation scenes with the boxes of the students, the teacher and the ground truth."""
    card = read_card(out / "student.safetensors")
    data = data_of(card)
    facts = facts_of(data)
    teacher, _ = build_teacher(read_card(find_weights(TEACHER))["model"], facts, weights=TEACHER, pretrained=False)
    options = DetectionOptions(**card["detection"])
    detectors: dict[str, nn.Module] = {
        {"alone": "student alone"}.get(method, method): load(
            card["model"],
            facts,
            num_classes=None,
            in_channels=None,
            weights=out / method / "seed-0" / "student.safetensors",
            detection=options,
        )
        for method in METHODS
        if method != "fitnet"
    }
    detectors["teacher"] = teacher
    images, targets = _first(data, SHOWN)
    with torch.no_grad():
        columns = {title: detector.eval()(images) for title, detector in detectors.items()}
    return draw_boxes(out / "boxes.png", images, {**columns, "truth": targets}, facts.classes)


def _first(data: LightningDataModule, count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return the first evaluation images and their targets."""
    images: list[Tensor] = []
    targets: list[dict[str, Tensor]] = []
    for some, theirs, _ in data.val_dataloader():
        images, targets = [*images, *some], [*targets, *theirs]
        if len(images) >= count:
            break
    return images[:count], targets[:count]
