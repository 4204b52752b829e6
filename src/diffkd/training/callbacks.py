"""Lightning callbacks: the report after the first step, the progress bar, and a line after each epoch."""

import logging
import math
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import nn

from diffkd.diffusion.standardization import Standardization
from diffkd.distill.distiller import Distiller
from diffkd.distill.ramp import ALWAYS
from diffkd.tasks.distributed import shards
from diffkd.tasks.task import TASK
from diffkd.training.lightning_module import Training, ends_step, steps_per_epoch
from diffkd.training.start_checks import never_reached


class StartReport(Callback):
    """Prints pairs, trainable parameters, the losses of the first batch, and the teacher's accuracy on it.

    Args:
        console: the output; pass a quiet one on ranks other than 0.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enable the measurement of gradient ratios ("pulls") in the first step, on all ranks."""
        if isinstance(pl_module, Training) and trainer.global_step == 0 and not shards(trainer):
            pl_module.measures_pulls = pl_module.distiller is not None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report after the very first step."""
        first = trainer.global_step == 1 and ends_step(trainer, batch_idx)
        if first and isinstance(pl_module, Training) and not self.console.quiet:
            with trainer.precision_plugin.train_step_context():
                report(pl_module, batch, self.console)


def report(training: Training, batch: Any, console: Console) -> None:
    """Print the report of a training that has taken its first step on `batch`."""
    console.print(
        f"student {type(training.student).__name__}: {_trainable(training.student)} trainable parameters",
        soft_wrap=True,
    )
    for note in training.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if training.distiller is not None:
        console.print(pairs_table(training.distiller))
    beside = ("gamma/", "weight/")
    losses = {name: value for name, value in training.loss_log.latest().items() if not name.startswith(beside)}
    console.print(
        "first batch: " + ", ".join(f"{name} {value:.4g}" for name, value in losses.items()),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for line, is_warning in _pulls(training.pulls or {}) + _targets(training.distiller):
        style = "bold red" if is_warning else None
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
    ramp = ALWAYS if training.distiller is None else training.method_ramp
    for beyond in never_reached(training.schedule, ramp, training.epochs):
        console.print(f"warning: {beyond}", style="bold red", markup=False, soft_wrap=True)
    if training.teacher is None or training.task.name == "representation":
        return
    if isinstance(training.teacher, nn.Module):
        training.teacher.to(training.device).eval()  # a whole detector; the distiller has moved only a part of it
    with torch.no_grad():
        judged = training.task.judge(training.teacher, batch)
        look = getattr(training.task, "confusions", None)
        confused = None if judged is None or look is None else look(training.teacher, batch)
    if judged is None:
        console.print(
            "the teacher has other classes than the data: how well it does was not measured",
            soft_wrap=True,
        )
        return
    share, chance = judged
    console.print(
        f"teacher on this batch: {100 * share:.1f} % right (chance {100 * chance:.1f} %)",
        highlight=False,
        soft_wrap=True,
    )
    if confused is not None:
        console.print(
            f"warning: the teacher may have its classes in another order: {confused}",
            style="bold red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    # With two classes no teacher is more than twice as good as chance.
    if share <= min(2 * chance, chance + 0.1 * (1 - chance)):
        console.print(
            "warning: the teacher is hardly better than chance. Are its weights loaded, are the classes in the same "
            "order, are the images normalised as it wants?",
            style="bold red",
            soft_wrap=True,
        )


def pairs_table(distiller: Distiller) -> Table:
    """Return the distiller's pairs as a table; long names wrap on a narrow terminal."""
    table = Table(
        title=distiller.title,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("pair", "student layer", "shape", "teacher layer", "shape", "method", "parameters"):
        table.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
    for row in distiller.rows():
        table.add_row(*(escape(cell) for cell in row))  # "fpn[0]" is a name here, no style
    return table


def _pulls(pulls: dict[str, float]) -> list[tuple[str, bool]]:
    """Return lines with each pair's gradient norm relative to the task's, and whether each is a warning."""
    if not pulls:
        return []
    shown = ", ".join(f"{pair} {pull:.3g}" if pull < math.inf else f"{pair} alone" for pair, pull in pulls.items())
    lines = [(f"pull of each pair, in that of the task (gradient norms at the student's layer): {shown}", False)]
    for pair, pull in pulls.items():
        if _TOO_HARD < pull < math.inf or pull < _TOO_SOFT:
            how, mend = ("drowns the task", "lower") if pull > 1 else ("hardly counts", "raise")
            lines.append(
                (
                    f"warning: pair {pair} pulls {pull:.3g} times as hard as the task and {how}: {mend} its weight, or "
                    "give weight: {balance: 1.0}, which finds one",
                    True,
                )
            )
    return lines


def _targets(distiller: Distiller | None) -> list[tuple[str, bool]]:
    """Return a line for each standardised target."""
    if distiller is None:
        return []
    return [
        (f"target of {name} standardised ({part or 'method'}): {module.summary()}", False)
        for name, method in zip(distiller.names, distiller.methods, strict=True)
        for part, module in method.named_modules()
        if isinstance(module, Standardization)
    ]


_TOO_HARD, _TOO_SOFT = 50.0, 0.01


def _trainable(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"


class TrainingProgress(Callback):
    """Shows a progress bar on a terminal, and prints a line after each epoch.

    Args:
        console: the output; a quiet one shows nothing.
        notebook: show a bar of tqdm, which notebooks draw; also done where the console is a notebook.
    """

    def __init__(self, console: Console, *, notebook: bool = False) -> None:
        self.console = console
        self.notebook = notebook or console.is_jupyter
        self._bar: Progress | None = None
        self._tqdm: Any = None
        self._row: TaskID | None = None
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        self._started = time.monotonic()
        total = steps_per_epoch(trainer) * (trainer.max_epochs or 1)
        if self.notebook and not self.console.quiet:
            from tqdm.auto import tqdm

            self._tqdm = tqdm(desc="training", total=total, initial=trainer.global_step)
            return
        if self.console.quiet or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._row = self._bar.add_task("training", total=total, completed=trainer.global_step)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar."""
        if self._tqdm is not None:
            self._tqdm.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", refresh=False)
            self._tqdm.update(trainer.global_step - self._tqdm.n)
        if self._bar is not None and self._row is not None:
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._bar.update(self._row, completed=trainer.global_step, description=epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the timer of the epoch."""
        self._started = time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save no state in checkpoints."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the results of the validation."""
        if not isinstance(pl_module, Training) or trainer.sanity_checking:
            return
        measured = pl_module.measured
        names = [name for name in pl_module.task.headlines if name in measured]
        scores = "  ".join(f"{name} {100 * measured[name]:.2f} %" for name in names)
        means = pl_module.loss_log.means()  # over all ranks: a collective call
        of_task = [mean for name, mean in means.items() if name.split("/")[0] == TASK]
        every = [mean for name, mean in means.items() if not name.startswith(("gamma/", "weight/"))]
        what, loss = ("task loss", sum(of_task)) if of_task else ("loss", sum(every))
        seconds = time.monotonic() - self._started
        width = len(str(trainer.max_epochs))
        self.console.print(
            f"epoch {trainer.current_epoch + 1:{width}d}/{trainer.max_epochs}  {what} {loss:.4f}  {scores}  "
            f"{seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )

        for pair in stuck_gammas(pl_module, means):
            self.console.print(
                f"gamma of {pair} was {means[f'gamma/{pair}']:.4f} on average: hardly any noise is added to the "
                "student's feature, which is not denoised then; noise_adapter: false saves the adapter, "
                "start_timestep: gamma ties the steps to it",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._tqdm is not None:
            self._tqdm.close()
            self._tqdm = None


def stuck_gammas(training: Training, means: Mapping[str, float]) -> list[str]:
    """Return the pairs whose gamma (noise adapter) was above 0.99 on average over an epoch."""
    if training.distiller is None:
        return []
    return [name for name in training.distiller.names if means.get(f"gamma/{name}", 0.0) > 0.99]


_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_IGNORED_WARNINGS = (
    # Epoch and batch determine the order of the data, so that it is resumable without a stateful loader.
    ".*your dataloader is not resumable",
    # Caused by Lightning's own dependencies.
    ".*LeafSpec.* is deprecated",
    # Batches are made on the device, or by the number of workers that the user set.
    ".*does not have many workers",
)


@contextmanager
def silence_lightning() -> Iterator[None]:
    """Silence Lightning's tips, device listings and warnings that do not apply, inside this context.

    Neither does the thread that writes TensorBoard's log print a traceback: `EventLog` reports what it raises.
    """
    usual_hook = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            usual_hook(failure)

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    threading.excepthook = hook
    try:
        with warnings.catch_warnings():
            for message in _IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        threading.excepthook = usual_hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
