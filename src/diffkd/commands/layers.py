"""`diffkd layers`: list the layers of a model, and how the layers of two models would be paired."""

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from diffkd.export.plain_student import named_model
from diffkd.export.student_file import read_card
from diffkd.features.activations import PRE
from diffkd.features.layers import list_layers
from diffkd.methods import MethodFactory
from diffkd.models.hub import fetch_student, is_hub
from diffkd.tasks.data_facts import DataFacts, TaskName
from diffkd.tasks.task_of_data import load, padded_example


def layers(
    model: str,
    *,
    teacher: str | None = None,
    task: TaskName = "classification",
    num_classes: int | None = None,
    in_channels: int = 3,
    image_size: int | None = None,
    method: MethodFactory | None = None,
) -> None:
    """Print the layers of a model; with a teacher, how their layers are paired.

    Args:
        model: name of the model, or of the student.
        teacher: name of the teacher.
        task: task of the models.
        num_classes: number of classes of both; None: each model's default, 20 for detectors and segmenters.
        in_channels: input channels.
        image_size: side of the images in pixels; None: the model's default size, 32 or 224.
        method: method to be paired; None: DiffKD.

    Raises:
        ValueError: if a model is unknown, cannot take such images, or nothing can be paired.
    """
    model = _of_hub(model) if is_hub(model) else model
    teacher = _of_hub(teacher) if teacher is not None and is_hub(teacher) else teacher
    classes = 20 if num_classes is None and task != "classification" else num_classes
    student = load(
        model, facts_of_size(task, classes, in_channels, image_size), num_classes=classes, in_channels=in_channels
    )
    side = usual_size(model, student) if image_size is None else image_size
    facts = facts_of_size(task, classes, in_channels, side)
    console = Console()
    if teacher is not None:
        # Lightning, which training needs, takes seconds to import.
        from diffkd.training.callbacks import pairs_table
        from diffkd.training.models import build_distiller

        other = load(teacher, facts, num_classes=classes, in_channels=in_channels)
        distiller = build_distiller(student, other, None, data=facts, pairs="auto", method=method, seed=0)
        console.print(pairs_table(distiller))
        return
    table = Table(title=f"{model}, images {in_channels}x{side}x{side}", title_justify="left")
    for column in ("layer", "type", "shape", "layout", ""):
        table.add_column(column, overflow="fold")  # a truncated name could not be copied into a pair
    for layer in list_layers(student, padded_example(facts, student)):
        note = "" if layer.instead is None else f"not distillable; take {layer.instead or 'a layer around it'}"
        if layer.elements:
            note = ", ".join(f"{name} {'x'.join(map(str, shape[1:]))}" for name, shape in layer.elements)
        if layer.before is not None:
            note = ", ".join(filter(None, [note, f"{layer.name}{PRE}: before the activation"]))
        shape = str(layer.feature_shape or "x".join(map(str, layer.shape[1:])))
        table.add_row(*map(escape, (layer.name, layer.type, shape, str(layer.layout or "unknown"), note)))
    console.print(table)


def _of_hub(name: str) -> str:
    """Return the name of the model that a student of the Hub is."""
    file = fetch_student(name)
    return named_model(read_card(file), file)


def facts_of_size(task: TaskName, classes: int | None, channels: int, side: int | None) -> DataFacts:
    """Return the `DataFacts` of data with that task and size."""
    count, size = classes or 1, 224 if side is None else side
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    return DataFacts(
        num_classes=count,
        in_channels=channels,
        image_size=(size, size),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        classes=tuple(map(str, range(count))),
        example=list(images) if task == "detection" else images,
        task=task,
        min_size=(size,),
        max_size=size,
    )


def usual_size(name: str, model: nn.Module) -> int:
    """Return the side of the images, in pixels, that a model of that name usually takes."""
    published = getattr(model, "pretrained_cfg", None)
    if isinstance(published, dict) and "input_size" in published:
        return int(published["input_size"][-1])
    return 32 if name.startswith("cifar/") else 224
