"""`diffkd demo`: distil packaged teachers into small students with several methods, in minutes on a CPU."""

import shutil
from pathlib import Path

from rich.console import Console

from diffkd.commands.compare import RECOMMENDED
from diffkd.commands.report import write_report_of
from diffkd.reports.tables import Row
from diffkd.tasks.data_facts import TaskName


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
        from diffkd.commands.demos.detection import detection_demo

        return detection_demo(out, 1 if seeds is None else seeds, epochs, jobs, console)
    if task == "segmentation":
        from diffkd.commands.demos.segmentation import segmentation_demo

        return segmentation_demo(out, 1 if seeds is None else seeds, epochs, jobs, console)
    if task == "representation":
        from diffkd.commands.demos.representation import representation_demo

        return representation_demo(out, 3 if seeds is None else seeds, 5 if epochs is None else epochs, jobs, console)
    from diffkd.commands.demos.classification import classification_demo

    return classification_demo(out, 3 if seeds is None else seeds, 7 if epochs is None else epochs, jobs, console)


def keep_recommended(out: Path) -> Path:
    """Copy the student of the recommended preset, with its card, from its first run; return its file."""
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(out / RECOMMENDED / "seed-0" / f"student{suffix}", out / f"student{suffix}")
    return out / "student.safetensors"


def finish(out: Path, console: Console, table: str, picture: Path) -> None:
    """Write the report again, with the picture, and say where everything is."""
    write_report_of(out, tell=str)
    console.print(f"table   {table}\npicture {picture}", soft_wrap=True)
    console.print(
        f"The student of {RECOMMENDED} is a plain model now. Try:\ndiffkd test {out / 'student.safetensors'}",
        soft_wrap=True,
    )
