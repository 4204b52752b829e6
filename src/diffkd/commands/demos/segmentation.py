"""`diffkd demo --task segmentation`: distil the packaged segmenter into a smaller one, and draw their class maps."""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from diffkd.commands.compare import RECOMMENDED, compare, cores
from diffkd.commands.demos import finish, keep_recommended
from diffkd.data import SegmentationScenes
from diffkd.export.student_file import find_weights, read_card
from diffkd.files.weights import write_text
from diffkd.models import AnySize, load_segmenter
from diffkd.reports.predictions import draw_overlays
from diffkd.reports.tables import Row, class_table_of

RECIPE = "scenes/segmentation"
METHODS = ("alone", "kd", "cwd", "diffkd", RECOMMENDED)
TEACHER_WEIGHTS = "scenes/teacher.safetensors"
IMAGES = 5
"""Number of scenes in the figure."""


def segmentation_demo(
    out: Path, seeds: int, epochs: int | None, jobs: int | None, console: Console, *, recipe: str = RECIPE
) -> list[Row]:
    """Train a small segmenter alone and with several methods on generated scenes, compare, and draw the class maps.

    Scenes are generated and the teacher comes with the package: nothing is downloaded. If interrupted and called again,
    it continues.

    Args:
        out: folder for the tables, the figure `demo.png`, the student of the recommended preset and all runs.
        seeds: runs of each method.
        epochs: length of each run; None: the recipe's.
        jobs: runs at the same time; None: one per core.
        console: console for progress messages.
        recipe: a recipe on scenes with the packaged teacher.

    Returns:
        A row per method.
    """
    card = read_card(find_weights(TEACHER_WEIGHTS))
    console.print(
        f"segmentation: {card['model']} ({100 * card['metrics']['miou']:.1f} % mIoU) teaches a smaller segmenter, "
        f"{len(METHODS)} methods, {seeds} seed(s) each, in {out}"
    )
    methods = [f"segmentation/{method}" for method in METHODS]
    options = [] if epochs is None else [f"--epochs={epochs}"]
    rows = compare(recipe, out, methods=methods, seeds=seeds, jobs=cores() if jobs is None else jobs, options=options)
    write_text(out / "classes.md", class_table_of(out, METHODS, seeds))
    keep_recommended(out)
    draw_class_maps(out, out / "demo.png")
    finish(out, console, f"{out / 'comparison.md'}, {out / 'classes.md'}", out / "demo.png")
    return rows


def draw_class_maps(out: Path, picture: Path, count: int = IMAGES) -> Path:
    """Draw evaluation scenes with the class maps of student alone, distilled student, teacher and ground truth.

    Of the first batch, the scenes with the most classes are drawn.

    Args:
        out: folder of the demonstration.
        picture: PNG or SVG file to write.
        count: number of scenes.

    Returns:
        The path of the picture.
    """
    weights = {
        "student alone": out / "alone" / "seed-0" / "student.safetensors",
        f"student, {RECOMMENDED}": out / RECOMMENDED / "seed-0" / "student.safetensors",
        "teacher": find_weights(TEACHER_WEIGHTS),
    }
    card = read_card(weights["student alone"])
    data = SegmentationScenes(**(card["data"]["init_args"] | {"seed": card["seed"], "train_count": 2}))
    images, masks, _ = next(iter(data.val_dataloader()))
    order = sorted(range(len(masks)), key=lambda index: -len(masks[index].unique()))[:count]
    images, masks = images[order], masks[order]
    maps = {title: _predict(file, images) for title, file in weights.items()} | {"truth": masks}
    return draw_overlays(picture, images, maps, data.classes, ignore_index=data.ignore_index)


def _predict(weights: Path, images: Tensor) -> Tensor:
    """Return the class ids (B, H, W) that a saved segmenter predicts for normalised images."""
    card = read_card(weights)
    model = load_segmenter(card["model"], num_classes=card["num_classes"], weights=weights)
    with torch.no_grad():
        ids: Tensor = AnySize(model).eval()(images).argmax(dim=1)
    return ids
