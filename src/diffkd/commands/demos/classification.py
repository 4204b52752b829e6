"""`diffkd demo`: distil the packaged classifier into a smaller one, and draw what student and teacher look at."""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from diffkd.commands.compare import RECOMMENDED, compare, cores
from diffkd.commands.demos import finish, keep_recommended
from diffkd.commands.plot import saved_training
from diffkd.files.history import read_csv
from diffkd.files.run_folder import RunFolder
from diffkd.reports.plots import draw_results, saliency
from diffkd.reports.tables import Row

RECIPE = "demo"
METHODS = ("alone", "kd", "dist", "diffkd", RECOMMENDED)
TEACHER = "cifar/compact_resnet14"
STUDENT = "cifar/compact_resnet8"


def classification_demo(out: Path, seeds: int, epochs: int, jobs: int | None, console: Console) -> list[Row]:
    """Train a small classifier alone and with several methods on packaged images, and compare.

    If interrupted and called again, it continues.

    Args:
        out: folder for the table, the figure `demo.png`, the student of the recommended preset and all runs.
        seeds: runs of each method.
        epochs: length of each run.
        jobs: runs at the same time; None: one per core.
        console: console for progress messages.

    Returns:
        A row per method.
    """
    console.print(
        f"classification: {TEACHER} teaches {STUDENT}, {len(METHODS)} methods, {seeds} seed(s) each, in {out}"
    )
    jobs, options = cores() if jobs is None else jobs, [f"--epochs={epochs}"]
    rows = compare(RECIPE, out, methods=list(METHODS), seeds=seeds, jobs=jobs, options=options)
    keep_recommended(out)
    curves = {
        method: [
            [100 * row["top1"] for row in read_csv(out / method / f"seed-{seed}" / "metrics.csv")]
            for seed in range(seeds)
        ]
        for method in METHODS
    }
    images, maps = _saliency_maps(out / RECOMMENDED / "seed-0")
    draw_results(out / "demo.png", curves, images, maps)
    finish(out, console, str(out / "comparison.json"), out / "demo.png")
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
