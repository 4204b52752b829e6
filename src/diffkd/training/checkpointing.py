"""Checkpoints, written whole and read as data, at epochs, steps and signals."""

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
from diffkd.tasks.distributed import local, several_processes
from diffkd.training.lightning_module import Training, ends_step

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818  (a request that was met is no error)
    """A training stopped because it was asked to, after saving a checkpoint.

    Args:
        message: what was saved and how to go on.
        signum: the signal that asked.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one of the same kind kills as usual.

    One of each is a single request: Ctrl-C reaches all processes of a terminal, and whoever started this one may pass
    it on as SIGTERM.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take the two signals over. Only the main thread may; elsewhere nothing is changed."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {signum: signal.signal(signum, self._note) for signum in _SIGNALS}

    def stop_listening(self) -> None:
        """Give the signals back to whoever had them before."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def agreed(self, device: torch.device) -> int:
        """Return the signal that any of the processes has received, 0 if none; call on all of them at once."""
        if not several_processes():
            return self.signum
        flag = torch.tensor(self.signum, device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return int(flag)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


class WholeFiles(CheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is whole; reads without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint`; on failure raise OSError and leave the file that was there."""
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
        ValueError: if it is damaged, holds anything but plain values and tensors, or is of another program.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the broken or hostile bytes lead it to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"{path} is no whole checkpoint ({reason}); start again, or take another one") from error
    if not isinstance(content, dict) or not isinstance(content.get("diffkd"), dict):
        raise ValueError(f"{path} is no checkpoint of this package; give the last.ckpt of a run folder")
    return content


class Saver(Checkpoint):
    """Saves at the end of every epoch, every so many steps, and when the training is asked to stop.

    Before anything is written, the losses and the weights are checked to be finite. A failure to write ends the
    training with the earlier checkpoint whole: going on could lose far more than the one epoch.

    Args:
        path: of the checkpoint; each overwrites the one before.
        every_steps: steps between two checkpoints within an epoch; None: at its end only.
        max_steps: end the training, as if it were complete, after so many steps; None: by epochs alone.
        on_epoch: called on the first process at the end of each epoch, before the checkpoint is written.
        how_to_resume: what to tell a user whose training was interrupted.
    """

    def __init__(
        self,
        path: Path,
        *,
        every_steps: int | None = None,
        max_steps: int | None = None,
        on_epoch: Callable[[Training], None] | None = None,
        how_to_resume: str = "",
    ) -> None:
        if (every_steps is not None and every_steps < 1) or (max_steps is not None and max_steps < 1):
            raise ValueError(f"save_every_steps and max_steps must be at least 1, got {every_steps} and {max_steps}")
        self.path, self.every_steps, self.max_steps = path, every_steps, max_steps
        self.on_epoch, self.how_to_resume = on_epoch, how_to_resume
        self.stop = StopRequest()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals, from here on: the trainer has installed its own handlers before."""
        self.stop.listen()
        if self.max_steps is not None and trainer.global_step >= self.max_steps:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, or if the training is to stop."""
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        if self.max_steps is not None and step >= self.max_steps:
            trainer.should_stop = True
            return
        if batch_idx + 1 == trainer.num_training_batches:
            return  # the end of the epoch saves, after validation
        training = _training(pl_module)
        due = self.every_steps is not None and step % self.every_steps == 0
        asks = due or trainer.world_size == 1 or step % training.log_every == 0
        signum = self.stop.agreed(pl_module.device) if asks else 0
        if due or signum:
            self.save(trainer, training)
        if signum:
            raise self._interrupted(trainer, signum)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and stop if that is asked for."""
        training = _training(pl_module)
        if self.on_epoch is not None:
            check_weights(training)
            if trainer.is_global_zero:
                self.on_epoch(training)
        self.save(trainer, training)
        finished = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        signum = self.stop.agreed(pl_module.device)
        if signum and not finished:
            raise self._interrupted(trainer, signum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self.stop.stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self.stop.stop_listening()

    def save(self, trainer: Trainer, training: Training) -> None:
        """Write the checkpoint; call on all processes at once.

        Raises:
            FloatingPointError: if a loss or a weight is not finite; nothing is written then.
            OSError: if the file cannot be written; the earlier one is whole then.
        """
        training.ledger.check()
        check_weights(training)
        trainer.save_checkpoint(self.path)

    def _interrupted(self, trainer: Trainer, signum: int) -> Interrupted:
        done = f"stopped after step {trainer.global_step} and saved {self.path}"
        return Interrupted(f"{done}. {self.how_to_resume}".strip(), signum)


def check_resumable(training: Training) -> None:
    """Raise ValueError if the state of the student or of a method could be saved, but not be read as data.

    Tensors and plain values can; what else `get_extra_state` returns would be found out by whoever resumes.
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
            except Exception as error:  # whatever pickling somebody's object raises
                raise ValueError(
                    f"entry {name!r} of the state of {owner} is a {type(value).__name__} that no checkpoint could give "
                    "back, since those hold tensors and plain values alone: let get_extra_state return such"
                ) from error


def check_weights(training: Training) -> None:
    """Raise FloatingPointError, naming the first, if weights of the student or of a method are not finite.

    A loss can be finite and its gradient not, so the losses alone do not tell. Call on all processes at once.
    """
    for owner, part in _parts(training):
        # Not what `get_extra_state` returned, nor what is sparse.
        state = {n: t for n, t in part.state_dict().items() if isinstance(t, Tensor) and t.layout is torch.strided}
        state = {n: local(t) for n, t in state.items() if t.is_floating_point()}
        if not state:
            continue
        finite = torch.stack([t.isfinite().all() for t in state.values()]).int()
        if several_processes():
            distributed.all_reduce(finite, op=distributed.ReduceOp.MIN)
        if not finite.all():
            name = next(n for n, whole in zip(state, finite.tolist(), strict=True) if not whole)
            raise FloatingPointError(
                f"weight '{name}' of {owner} was not finite after step {training.global_step}, though the losses were; "
                "lower the learning rate or clip gradients. The earlier checkpoint is whole."
            )


def _parts(training: Training) -> Iterator[tuple[str, nn.Module]]:
    """Yield what is trained, with words for whose it is."""
    yield "the student", training.student
    if training.distiller is not None:
        for name, method in zip(training.distiller.names, training.distiller.methods, strict=True):
            yield f"the {type(method).__name__} of pair '{name}'", method


def _training(module: LightningModule) -> Training:
    if not isinstance(module, Training):
        raise TypeError(f"Saver saves a Training, not a {type(module).__name__}")
    return module
