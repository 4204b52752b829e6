"""Progress of a training: a progress bar and one line per epoch; filters for Lightning's log messages and warnings."""

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diffkd.diffusion.modules import NoiseAdapter
from diffkd.tasks.task import TASK
from diffkd.training.lightning_module import Training, steps_per_epoch


class TrainingProgress(Callback):
    """Shows a progress bar on a terminal, and prints a line after each epoch.

    Args:
        console: the output; a quiet one shows nothing.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._row: TaskID | None = None
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        self._started = time.monotonic()
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
        total = steps_per_epoch(trainer) * (trainer.max_epochs or 1)
        self._row = self._bar.add_task("training", total=total, completed=trainer.global_step)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar."""
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
        loss = sum(mean for name, mean in means.items() if name.split("/")[0] == TASK) if means else float("nan")
        seconds = time.monotonic() - self._started
        width = len(str(trainer.max_epochs))
        self.console.print(
            f"epoch {trainer.current_epoch + 1:{width}d}/{trainer.max_epochs}  task loss {loss:.4f}  {scores}  "
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


def stuck_gammas(training: Training, means: Mapping[str, float]) -> list[str]:
    """Return the pairs whose gamma (noise adapter) was above 0.99 on average over an epoch."""
    if training.distiller is None:
        return []
    return [
        name
        for name, method in zip(training.distiller.names, training.distiller.methods, strict=True)
        if means.get(f"gamma/{name}", 0.0) > 0.99 and any(isinstance(part, NoiseAdapter) for part in method.modules())
    ]


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
    """Silence Lightning's tips, device listings and warnings that do not apply, inside this context."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
