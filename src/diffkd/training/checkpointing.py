"""Checkpoints at epochs, steps and signals: written atomically, read without running code."""

import io
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, distributed, nn

from diffkd.files.weights import write_whole
from diffkd.tasks.distributed import local_tensor, several_processes
from diffkd.training.lightning_module import Training, ends_step, starts_within_epochs

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818  (a stop on request is no error)
    """A training stopped on a signal, after saving a checkpoint.

    Args:
        message: what was saved and how to resume.
        signum: the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Records the first SIGINT or SIGTERM; a second signal of the same kind has its default effect.

    One of each is a single request: Ctrl-C reaches all processes of a terminal, and a launcher may forward it as
    SIGTERM.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Install the signal handlers; does nothing outside of the main thread."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {signum: signal.signal(signum, self._note) for signum in _SIGNALS}

    def stop_listening(self) -> None:
        """Restore the previous signal handlers."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def agreed(self, device: torch.device) -> int:
        """Return the signal that any rank has received, 0 if none; a collective call."""
        if not several_processes():
            return self.signum
        flag = torch.tensor(self.signum, device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return int(flag)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint to a temporary file and renames it when complete; reads without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint`; on failure raise OSError and keep the previous file."""
        write_whole(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of plain values and tensors."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this package on the CPU, without running any code in it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds anything but plain values and tensors, or is not from this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types of exceptions for damaged or malicious files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"{path} is no whole checkpoint ({reason}); start again, or take another one") from error
    if not isinstance(content, dict) or not isinstance(content.get("diffkd"), dict):
        raise ValueError(f"{path} is no checkpoint of this package; give the last.ckpt of a run folder")
    return content


class Saver(Checkpoint):
    """Saves at the end of every epoch, every `every_steps` steps, and on a stop signal.

    Within an epoch it saves only if the data can go on from there, by their `start_batch`; otherwise a stop keeps the
    checkpoint of the last whole epoch.

    Before writing, it checks that the losses and the weights are finite. A failure to write ends the training and
    keeps the previous checkpoint: continuing could lose more than one epoch.

    Args:
        path: of the checkpoint; each overwrites the previous one.
        every_steps: steps between two checkpoints within an epoch; None: at its end only.
        max_steps: number of steps after which the training ends as complete; None: only `epochs` counts.
        on_epoch: called on rank 0 at the end of each epoch, before the checkpoint is written.
        before_save: called on rank 0 before each checkpoint is written.
        how_to_resume: message for the user of an interrupted training.
    """

    def __init__(
        self,
        path: Path,
        *,
        every_steps: int | None = None,
        max_steps: int | None = None,
        on_epoch: Callable[[Training], None] | None = None,
        before_save: Callable[[], None] | None = None,
        how_to_resume: str = "",
    ) -> None:
        if (every_steps is not None and every_steps < 1) or (max_steps is not None and max_steps < 1):
            raise ValueError(f"save_every_steps and max_steps must be at least 1, got {every_steps} and {max_steps}")
        self.path, self.every_steps, self.max_steps = path, every_steps, max_steps
        self.on_epoch, self.before_save, self.how_to_resume = on_epoch, before_save, how_to_resume
        self.stop = StopRequest()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers, after the trainer has installed its own."""
        self.stop.listen()
        if self.max_steps is not None and trainer.global_step >= self.max_steps:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due or a stop was requested."""
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        if self.max_steps is not None and step >= self.max_steps:
            trainer.should_stop = True
            return
        if batch_idx + 1 == trainer.num_training_batches:
            return  # saved at the end of the epoch, after validation
        training = _training(pl_module)
        due = self.every_steps is not None and step % self.every_steps == 0
        asks = due or trainer.world_size == 1 or step % training.log_every == 0
        signum = self.stop.agreed(pl_module.device) if asks else 0
        goes_on = starts_within_epochs(getattr(trainer, "datamodule", None))
        if (due or signum) and goes_on:
            self.save(trainer, training)
        if signum:
            raise self._interrupted(trainer, training, signum, saved=goes_on)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and stop if requested."""
        training = _training(pl_module)
        if self.on_epoch is not None:
            check_weights(training)
            if trainer.is_global_zero:
                self.on_epoch(training)
        self.save(trainer, training)
        finished = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        signum = self.stop.agreed(pl_module.device)
        if signum and not finished:
            raise self._interrupted(trainer, training, signum, saved=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self.stop.stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self.stop.stop_listening()

    def save(self, trainer: Trainer, training: Training) -> None:
        """Write the checkpoint; a collective call.

        Raises:
            FloatingPointError: if a loss or a weight is not finite; nothing is written.
            OSError: if the file cannot be written; the previous one is kept.
        """
        training.loss_log.check()
        check_weights(training)
        if self.before_save is not None and trainer.is_global_zero:
            self.before_save()
        trainer.save_checkpoint(self.path)

    def _interrupted(self, trainer: Trainer, training: Training, signum: int, *, saved: bool) -> Interrupted:
        done = f"stopped after step {trainer.global_step}"
        if saved:
            done += f" and saved {self.path}"
        else:
            data = type(getattr(trainer, "datamodule", None)).__name__
            kept = "nothing is saved, and the run begins anew"
            if (last := training.history.last) is not None:
                kept = (
                    f"{self.path} stays that of epoch {last['epoch']:.0f} (step {last['step']:.0f}), the last whole one"
                )
            done += f". {data} has no start_batch by which to go on within an epoch: {kept}"
        return Interrupted(f"{done}. {self.how_to_resume}".strip(), signum)


def check_resumable(training: Training) -> None:
    """Raise ValueError if the state of the student or of a method cannot be loaded with `weights_only=True`.

    Objects from `get_extra_state` other than tensors and plain values would fail only when the run is resumed.
    """
    for owner, part in _parts(training):
        for name, value in part.state_dict().items():
            if isinstance(value, Tensor):
                continue
            file = io.BytesIO()
            try:
                torch.save(value, file)
                file.seek(0)
                torch.load(file, weights_only=True)
            except Exception as error:  # pickling an arbitrary object may raise anything
                raise ValueError(
                    f"entry {name!r} of the state of {owner} is a {type(value).__name__} that no checkpoint could give "
                    "back, since those hold tensors and plain values alone: let get_extra_state return such"
                ) from error


def check_weights(training: Training) -> None:
    """Raise FloatingPointError, naming the first, if weights of the student or of a method are not finite.

    Finite losses do not suffice: the gradient of a finite loss may be non-finite. A collective call.
    """
    for owner, part in _parts(training):
        # Without the values of `get_extra_state` and sparse tensors.
        state = {n: t for n, t in part.state_dict().items() if isinstance(t, Tensor) and t.layout is torch.strided}
        state = {n: local_tensor(t) for n, t in state.items() if t.is_floating_point()}
        if not state:
            continue
        finite = torch.stack([t.isfinite().all() for t in state.values()]).int()
        if several_processes():
            distributed.all_reduce(finite, op=distributed.ReduceOp.MIN)
        if not finite.all():
            name = next(n for n, is_finite in zip(state, finite.tolist(), strict=True) if not is_finite)
            raise FloatingPointError(
                f"weight '{name}' of {owner} was not finite after step {training.global_step}, though the losses were; "
                "lower the learning rate or clip gradients. The earlier checkpoint is whole."
            )


def _parts(training: Training) -> Iterator[tuple[str, nn.Module]]:
    """Yield the trained modules, each with a description for messages."""
    yield "the student", training.student
    if training.distiller is not None:
        for name, method in zip(training.distiller.names, training.distiller.methods, strict=True):
            yield f"the {type(method).__name__} of pair '{name}'", method


def _training(module: LightningModule) -> Training:
    if not isinstance(module, Training):
        raise TypeError(f"Saver saves a Training, not a {type(module).__name__}")
    return module
