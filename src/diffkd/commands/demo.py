"""`diffkd demo`: distil the packaged teacher into a small student with several methods, in minutes on a CPU."""

import shutil
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from diffkd.commands.compare import RECOMMENDED, compare, cores
from diffkd.commands.demo_detection import detection_demo
from diffkd.commands.demo_representation import representation_demo
from diffkd.commands.demo_segmentation import segmentation_demo
from diffkd.commands.plot import saved_training
from diffkd.commands.report import write_report_of
from diffkd.files.history import read_csv
from diffkd.files.run_folder import RunFolder
from diffkd.reports.plots import draw_results, saliency
from diffkd.reports.tables import Row
from diffkd.tasks.data_facts import TaskName

RECIPE = "demo"
METHODS = ("alone", "kd", "dist", "diffkd", RECOMMENDED)
TEACHER = "cifar/compact_resnet14"
STUDENT = "cifar/compact_resnet8"


def demo(
    out: Path = Path("diffkd-demo"),
    *,
    task: TaskName = "classification",
    seeds: int | None = None,
    epochs: int | None = None,
    jobs: int | None = None,
) -> list[Row]:
    """Train a small student alone and with several methods, and compare.

    Images and teacher come with the package: nothing is downloaded. All results are measured in this run. If
    interrupted and called again, it continues.

    Args:
        out: folder for the table (JSON, Markdown), the figure, a distilled student and all runs.
        task: task of the demonstration.
        seeds: runs of each method; None: 3 for classification and representation, 1 for the others.
        epochs: length of each run; None: 7 for classification, 5 for representation, where few labels are trained on
            afterwards, the recipe's for the others.
        jobs: runs at the same time; None: one per core.

    Returns:
        A row per method.
    """
    console = Console(stderr=True)
    if task == "detection":
        return detection_demo(out, 1 if seeds is None else seeds, epochs, jobs, console)
    if task == "segmentation":
        return segmentation_demo(out, 1 if seeds is None else seeds, epochs, jobs, console)
    if task == "representation":
        return representation_demo(out, 3 if seeds is None else seeds, 5 if epochs is None else epochs, jobs, console)
    seeds, epochs = 3 if seeds is None else seeds, 7 if epochs is None else epochs
    console.print(f"{task}: {TEACHER} teaches {STUDENT}, {len(METHODS)} methods, {seeds} seed(s) each, in {out}")
    jobs, options = cores() if jobs is None else jobs, [f"--epochs={epochs}"]
    rows = compare(RECIPE, out, methods=list(METHODS), seeds=seeds, jobs=jobs, options=options)
    run = out / RECOMMENDED / "seed-0"
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(run / f"student{suffix}", out / f"student{suffix}")
    curves = {
        method: [
            [100 * row["top1"] for row in read_csv(out / method / f"seed-{seed}" / "metrics.csv")]
            for seed in range(seeds)
        ]
        for method in METHODS
    }
    images, maps = _saliency_maps(run)
    draw_results(out / "demo.png", curves, images, maps)
    write_report_of(out, tell=str)  # again, with the picture
    console.print(f"table   {out / 'comparison.json'}\npicture {out / 'demo.png'}", soft_wrap=True)
    console.print(
        f"The student of {RECOMMENDED} is a plain model now. Try:\ndiffkd test {out / 'student.safetensors'}",
        soft_wrap=True,
    )
    return rows


def _saliency_maps(run: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Return test images of six classes, and the saliency maps of student, denoised student and teacher."""
    training, data = saved_training(RunFolder(run))
    distiller = training.distiller
    assert distiller is not None
    images, labels, _ = next(iter(data.val_dataloader()))
    chosen = [labels.tolist().index(label) for label in sorted(set(labels.tolist()))[:6]]
    torch.manual_seed(0)
    with torch.no_grad():
        seen = distiller.eval().observe(images[chosen])[distiller.names[0]]
    assert isinstance(seen.student, Tensor)  # one layer on each side
    maps = {
        "student": saliency(seen.student),
        "denoised": saliency(seen.result.denoised),
        "teacher": saliency(seen.result.target),
    }
    return images[chosen], maps
