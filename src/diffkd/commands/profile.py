"""`diffkd profile`: what a student costs, beside its teacher."""

import json as json_lines
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from diffkd.commands.compare import cores
from diffkd.commands.layers import facts_of_size, usual_size
from diffkd.commands.predict import torch_device
from diffkd.export.student_file import PROGRAMS, Which
from diffkd.files.run_folder import RunFolder
from diffkd.files.weights import check_target, write_text
from diffkd.inference.cost import RUNTIMES, Runtime, Subject, measure_costs
from diffkd.inference.students import load_student
from diffkd.models.hub import is_hub
from diffkd.reports.tables import cost_tables
from diffkd.tasks.data_facts import TaskName
from diffkd.tasks.task_of_data import load


def profile(
    student: str,
    *,
    teacher: str | None = None,
    batch_sizes: list[int] | None = None,
    threads: list[int] | None = None,
    runtimes: list[Runtime] | None = None,
    rounds: int = 20,
    seconds: float = 20.0,
    image_size: list[int] | None = None,
    task: TaskName = "classification",
    num_classes: int | None = None,
    in_channels: int = 3,
    model: str | None = None,
    which: Which = "last",
    out: Path | None = None,
    json: bool = False,
    accelerator: str = "cpu",
    progress: bool = True,
    trust: list[str] | None = None,
) -> dict[str, Any]:
    """Print parameters, multiply-adds, file sizes, and the time of a forward pass by runtime, batch and threads.

    Everything is measured side by side on random images: in each round, each model runs once in each runtime. Times
    are medians, with quartiles in brackets.

    Args:
        student: folder of a run, file of weights with its card, or the name of a model, as for fit.
        teacher: the same for a second model.
        batch_sizes: images in a pass; None: 1 and 16.
        threads: numbers of CPU threads; None: 1 and as many as there are cores.
        runtimes: some of pytorch, compiled (by torch.compile), onnx and onnx-int8 (dynamically quantised, both in
            onnxruntime); None: all.
        rounds: passes of each model and runtime.
        seconds: limit for all rounds of one batch size and number of threads, after at least three.
        image_size: [H, W] in pixels, or one side of a square; None: as in training, or the model's usual size.
        task: for names of models: their task.
        num_classes: for names of models: number of classes; None: the model's default, 20 for detectors and segmenters.
        in_channels: for names of models: input channels.
        model: name of the student's model, if its card names none, or names your own code.
        which: for a run, the student of the last or of the best epoch.
        out: JSON file to write; None: for a run, `profile.json` in its folder, which its report shows.
        json: print the JSON instead of the tables.
        accelerator: cpu, gpu, mps, or auto; onnxruntime runs on the CPU.
        progress: say what is being measured.
        trust: files and modules of your own whose code the card may name; may be repeated.

    Returns:
        The content of the JSON file.

    Raises:
        FileNotFoundError: if there is no such student or file.
        ValueError: if a number is out of range, or a model cannot be built.
        OSError: if the file cannot be written.
    """
    device = torch_device(accelerator)
    named: dict[str, Any] = {"task": task, "num_classes": num_classes, "in_channels": in_channels, "trust": trust or ()}
    subjects = [_subject("student", student, image_size, model=model, which=which, **named)]
    if teacher is not None:
        facts, size = subjects[0].facts, list(subjects[0].facts.image_size)
        named |= {"task": facts.task, "in_channels": facts.in_channels}
        if num_classes is None:
            named["num_classes"] = facts.num_classes
        subjects.append(_subject("teacher", teacher, image_size or size, **named))
    target = RunFolder(student).path / "profile.json" if out is None and RunFolder(student).config.is_file() else out
    if target is not None:
        check_target(target, "profile.json")
    console = Console(stderr=True, quiet=not progress)
    with TemporaryDirectory() as folder:
        found = measure_costs(
            subjects,
            Path(folder),
            runtimes=RUNTIMES if runtimes is None else runtimes,
            batch_sizes=(1, 16) if batch_sizes is None else batch_sizes,
            threads=sorted({1, cores()}) if threads is None else threads,
            rounds=rounds,
            seconds=seconds,
            device=device,
            on_step=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        )
    if json:
        print(json_lines.dumps(found, indent=2))  # noqa: T201
    else:
        shown = Console()
        for title, cells in cost_tables(found).items():
            shown.print(_table(title, cells))
        for line in _missing(found["models"]):
            shown.print(line, highlight=False, markup=False, soft_wrap=True)
    if target is not None:
        write_text(target, json_lines.dumps(found, indent=2) + "\n")
        console.print(str(target), highlight=False, markup=False, soft_wrap=True)
    return found


def _subject(
    name: str,
    source: str,
    image_size: Sequence[int] | None,
    *,
    task: TaskName,
    num_classes: int | None,
    in_channels: int,
    trust: Sequence[str],
    model: str | None = None,
    which: Which = "last",
) -> Subject:
    """Return a saved model, or else one by its name with random weights."""
    path = Path(source).expanduser()
    if path.suffix in PROGRAMS:
        raise ValueError(f"{source} is a program already: give the run or the weights that it was exported from")
    packaged = source.endswith(".safetensors")
    if path.exists() or packaged or is_hub(source):
        saved = load_student(source, which=which, model=model, trust=trust)
        facts = saved.facts if image_size is None else replace(saved.facts, image_size=_sides(image_size))
        return Subject(name, str(model or saved.card.get("model")), saved.module, facts)
    classes = 20 if num_classes is None and task != "classification" else num_classes
    side = None if image_size is None else _sides(image_size)
    facts = facts_of_size(task, classes, in_channels, None if side is None else max(side))
    try:
        built = load(source, facts, num_classes=classes, in_channels=in_channels)
    except (ValueError, ImportError, OSError) as error:
        raise type(error)(f"{source} is no run, no file, and no model that can be built: {error}") from error
    size = side or (usual_size(source, built),) * 2
    return Subject(name, source, built.eval(), replace(facts, image_size=size, example=None))


def _sides(image_size: Sequence[int]) -> tuple[int, int]:
    size = tuple(image_size) * (2 if len(image_size) == 1 else 1)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size {list(image_size)} is no height and width in pixels; give --image_size=[224,224]")
    return size[0], size[1]


def _table(title: str, cells: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(cells[0]):
        table.add_column(name, justify="left" if column < 2 else "right", overflow="fold")
    for line in cells[1:]:
        table.add_row(*line)
    return table


def _missing(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{name} was not measured in {runtime}: {reason}"
        for name, cost in models.items()
        for runtime, reason in cost["missing"].items()
    ]
