"""`layers`: what a model is made of, and how two models would be paired."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn, zeros

from diffkd.distiller import Distiller
from diffkd.layers import list_layers
from diffkd.methods import DiffKD, MethodFactory
from diffkd.models import load_model
from diffkd.tasks.describe import factory_of
from diffkd.tasks.report import pairs_table


def layers(
    model: str,
    *,
    teacher: str | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    image_size: int | None = None,
    method: MethodFactory | None = None,
) -> None:
    """Print the layers of a model; with a teacher, how the two are paired.

    Args:
        model: name of the model, or of the student.
        teacher: name of the teacher.
        num_classes: classes of both; None: each its own.
        in_channels: channels of the images.
        image_size: side of the images in pixels; None: what the model was made for, 32 or 224.
        method: which pairs are wanted for; None: DiffKD.

    Raises:
        ValueError: if a model is unknown, cannot take such images, or nothing can be paired.
    """
    student = load_model(model, num_classes=num_classes, in_channels=in_channels)
    side = _usual_size(model, student) if image_size is None else image_size
    example = zeros(2, in_channels, side, side)
    console = Console()
    if teacher is not None:
        other = load_model(teacher, num_classes=num_classes, in_channels=in_channels)
        factory = DiffKD if method is None else factory_of(method)
        console.print(pairs_table(Distiller(student, other, example=example, method=factory)))
        return
    table = Table(title=f"{model}, images {in_channels}x{side}x{side}", title_justify="left")
    for column in ("layer", "type", "shape", "layout", ""):
        table.add_column(column)
    for layer in list_layers(student, example):
        note = "" if layer.instead is None else f"not distillable; take {layer.instead or 'a layer around it'}"
        shape = str(layer.feature_shape or "x".join(map(str, layer.shape[1:])))
        table.add_row(*map(escape, (layer.name, layer.type, shape, str(layer.layout or "unknown"), note)))
    console.print(table)


def _usual_size(name: str, model: nn.Module) -> int:
    published = getattr(model, "pretrained_cfg", None)
    if isinstance(published, dict) and "input_size" in published:
        return int(published["input_size"][-1])
    return 32 if name.startswith("cifar/") else 224
