"""The report at the start of a training, from its first step: what learns from what, and whether it can."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from diffkd.distiller import Distiller
from diffkd.tasks.classification import ClassificationTask, logits_of


class StartReport(Callback):
    """Prints pairs, trainable parameters by part, each loss of the first batch, and the teacher's accuracy on it.

    Args:
        console: where to; on other processes than the first, pass a quiet one.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report after the very first step."""
        if trainer.global_step == 1 and isinstance(pl_module, ClassificationTask) and not self.console.quiet:
            images, labels, _ = batch
            with trainer.precision_plugin.train_step_context():
                report(pl_module, images, labels, self.console)


def report(task: ClassificationTask, images: Tensor, labels: Tensor, console: Console) -> None:
    """Print the report of a task that has taken its first step on `images` (B, C, H, W) and `labels` (B,)."""
    console.print(
        f"student {type(task.student).__name__}: {_trainable(task.student)} trainable parameters", soft_wrap=True
    )
    distiller = task.distiller
    if distiller is not None:
        console.print(pairs_table(distiller))
    losses = {name: value for name, value in task.ledger.latest().items() if not name.startswith("gamma/")}
    console.print(
        "first batch: " + ", ".join(f"{name} {value:.4g}" for name, value in losses.items()),
        highlight=False,
        soft_wrap=True,
    )
    if distiller is None:
        return
    accuracy, classes = teacher_accuracy(distiller, images, labels)
    if classes != task.num_classes:
        console.print(
            f"the teacher has {classes} classes, the data {task.num_classes}: its accuracy was not measured",
            soft_wrap=True,
        )
        return
    chance = 1 / classes
    console.print(
        f"teacher on this batch: {100 * accuracy:.1f} % right (chance {100 * chance:.1f} %)",
        highlight=False,
        soft_wrap=True,
    )
    if accuracy <= 2 * chance:
        console.print(
            "warning: the teacher is hardly better than chance. Are its weights loaded, are the classes in the same "
            "order, are the images normalised as it wants?",
            style="bold red",
            soft_wrap=True,
        )


def pairs_table(distiller: Distiller) -> Table:
    """Return the distiller's pairs as a table."""
    names = (type(distiller.student).__name__, type(distiller.teacher).__name__)
    table = Table(title=f"{names[0]} learns from {names[1]}", title_justify="left")
    for column in ("pair", "student layer", "shape", "teacher layer", "shape", "method", "parameters"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for row in distiller.rows():
        table.add_row(*row)
    return table


@torch.no_grad()
def teacher_accuracy(distiller: Distiller, images: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the share of a batch that the teacher gets right, and the number of its classes."""
    inputs = images if distiller.teacher_input is None else distiller.teacher_input(images)
    logits = logits_of(distiller.teacher(inputs))
    return float((logits.argmax(dim=1) == labels).float().mean()), logits.shape[1]


def _trainable(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"
