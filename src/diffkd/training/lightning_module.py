"""The LightningModule that trains and validates a student on any task, alone or with a teacher."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from diffkd.data.seeding import mix_seed
from diffkd.distill.distiller import Distiller
from diffkd.distill.ramp import ALWAYS, Ramp
from diffkd.export.student_file import with_metrics
from diffkd.features.forward import run
from diffkd.files.history import History, Row
from diffkd.methods import DiffKD
from diffkd.tasks.data_facts import check_classes, check_samples, describe_samples
from diffkd.tasks.distributed import UnshardedStudent, broadcast_buffers, several_processes, shard, shards
from diffkd.tasks.task import Meter, Step, Task
from diffkd.training.cached_teacher import CachedTeacher
from diffkd.training.ema import StudentEMA
from diffkd.training.loss_log import LossLog
from diffkd.training.optimization import OptimizerFactory, Schedule, build_optimizer, set_learning_rate
from diffkd.training.plain_loaders import check_apart


def first_of_step(trainer: Trainer, batch: int) -> int:
    """Return the index of the first batch in the optimiser step of a batch; both count from 0 in the epoch."""
    return batch - batch % trainer.accumulate_grad_batches


def ends_step(trainer: Trainer, batch: int) -> bool:
    """Whether the optimiser steps after this batch of the epoch."""
    return (batch + 1) % trainer.accumulate_grad_batches == 0 or batch + 1 == trainer.num_training_batches


def batches_of_step(trainer: Trainer, batch: int) -> int:
    """Return the number of batches in the optimiser step of a batch; the last step of an epoch may have fewer."""
    left = trainer.num_training_batches - first_of_step(trainer, batch)
    return int(min(trainer.accumulate_grad_batches, left))


def steps_per_epoch(trainer: Trainer) -> int:
    """Return the number of optimiser steps in an epoch."""
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def starts_within_epochs(data: Any) -> bool:
    """Whether a data module can leave out the first batches of an epoch, which its `start_batch` counts."""
    return hasattr(data, "start_batch")


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )


def _described(batch: Any) -> str:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else None
    if isinstance(images, Tensor):
        return f"a batch of {'x'.join(map(str, images.shape))}"
    return f"a batch of {len(images)} images" if isinstance(images, list) else "a batch"


class Training(LightningModule):
    """Trains a student and validates it after every epoch.

    The loss is `task_weight * task's losses + method_weight * sum of the distiller's losses` (Eq. 9 of the DiffKD
    paper; the distiller's own weights are inside the sum).

    The random generators are seeded by (seed, step, rank) at every step, and the learning rate depends on the step
    alone, so that resuming needs no generator state. With gradient accumulation, a step takes the mean over its
    batches with equal weights.

    Args:
        model: a :class:`~diffkd.Distiller`, or a plain student to train without a teacher.
        task: defines batches, losses and measurements.
        optimizer: makes the optimiser from parameter groups, such as `partial(torch.optim.SGD, lr=0.1)`.
        schedule: factor of the learning rate by epoch.
        epochs: length of the training.
        decay_all: see :func:`~diffkd.training.optimization.build_optimizer`.
        task_weight: factor of the task's losses.
        method_weight: factor of all distillation losses.
        method_ramp: factor of the distillation losses by epoch.
        ema: decay of an exponential moving average of the student, which is then validated and saved; None: no average.
        seed: of all random numbers of a step.
        log_every: steps between two checks and log entries of the losses, which synchronise with the device.
        teacher: the whole teacher, from the student's images to its output, whose accuracy is reported at the start;
            None: the distiller's.
    """

    def __init__(
        self,
        model: Distiller | nn.Module,
        task: Task,
        *,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        epochs: int,
        decay_all: bool = True,
        task_weight: float = 1.0,
        method_weight: float = 1.0,
        method_ramp: Ramp = ALWAYS,
        ema: float | None = None,
        seed: int = 0,
        log_every: int = 50,
        teacher: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        if epochs < 1 or log_every < 1:
            raise ValueError(f"epochs and log_every must be at least 1, got {epochs} and {log_every}")
        if not (0 <= task_weight < math.inf and 0 <= method_weight < math.inf):
            raise ValueError(
                f"task_weight and method_weight must be finite and at least 0, got {task_weight} and {method_weight}"
            )
        self.model, self.task = model, task
        # In a list, as they are registered with the model. A compiled step keeps the passes that were drawn last.
        self._drawn = [one for one in model.modules() if isinstance(one, DiffKD) and len(one.inference_steps) > 1]
        self.epochs = epochs
        self.optimizer_factory, self.schedule, self.decay_all = optimizer, schedule, decay_all
        self.task_weight, self.method_weight, self.method_ramp = task_weight, method_weight, method_ramp
        self._method_factor = method_weight
        self.seed, self.log_every = seed, log_every
        self._teacher = [teacher]  # in a list, so that it is no submodule
        self.ema = None if ema is None else StudentEMA(self.student, ema)
        self._unsharded: UnshardedStudent | None = None
        self.loss_log, self.history = LossLog(), History(task.headlines[0])
        self.card: dict[str, Any] = {}
        self.notes: list[str] = []  # lines about how the models were built, for the start report
        self._samples: dict[str, Any] = {}
        self.cached_teacher: CachedTeacher | None = None
        self.measures_pulls = False
        self.pulls: dict[str, float] | None = None
        self._apart = False  # whether the processes were found to have batches of their own
        self._meters: dict[str, Meter] = {}
        self._measured: Row = {}
        self._seconds, self._since = 0.0, time.monotonic()

    @property
    def distiller(self) -> Distiller | None:
        """The distiller, None if the student is trained alone."""
        return self.model if isinstance(self.model, Distiller) else None

    @property
    def student(self) -> nn.Module:
        """The model being trained."""
        return self.model.student if isinstance(self.model, Distiller) else self.model

    @property
    def result(self) -> nn.Module:
        """The model that is validated and saved: the EMA of the student if there is one, the student otherwise."""
        return self._plain_student if self.ema is None else self.ema.model

    @property
    def teacher(self) -> Callable[[Any], Any] | None:
        """A function from the student's images to the teacher's output; None without a teacher."""
        if self._teacher[0] is not None or self.distiller is None:
            return self._teacher[0]
        return self.distiller.teach

    def configure_model(self) -> None:
        """Shard the parameters over the ranks, if the strategy is FSDP."""
        if self.distiller is not None and self.distiller.balancer is not None and shards(self.trainer):
            raise ValueError(
                "a Balance measures gradients at whole features, which strategy fsdp does not give: take ddp, or a "
                "number as the pair's weight"
            )
        if self._unsharded is None and shards(self.trainer):
            self.trainer.precision_plugin.convert_module(self.model)
            self._unsharded = UnshardedStudent(self.student)
            shard(self.model, self.trainer.strategy.root_device, self.trainer.world_size)

    def configure_optimizers(self) -> Optimizer:
        """Build the optimiser, and check that it has all trainable parameters."""
        optimizer = build_optimizer(self.model, self.optimizer_factory, decay_all=self.decay_all)
        if self.distiller is not None:
            self.distiller.check_optimizer(optimizer)
        return optimizer

    def on_fit_start(self) -> None:
        """Move the student's copies to its device."""
        for copied in (self.ema, self._unsharded):
            if copied is not None:
                copied.model.to(self.device)
        self._since = time.monotonic()

    def on_train_start(self) -> None:
        """Raise ValueError if a resumed training has other samples than before."""
        samples = describe_samples(self.trainer.train_dataloader)
        check_samples(self._samples, samples)
        self._samples = samples

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate and seed the random generators, both from the step alone."""
        begun = first_of_step(self.trainer, batch_idx)
        epoch = self.current_epoch + begun / self.trainer.num_training_batches
        set_learning_rate(self._optimizer(), self.schedule(epoch, self.epochs))
        self._method_factor = self.method_weight * self.method_ramp(epoch)
        if self.distiller is not None:
            self.distiller.set_epoch(epoch)
        torch.manual_seed(self._mixed_seed(batch_idx))
        for method in self._drawn:
            method.draw()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the weighted sum of all losses of a batch."""
        step = self.task.step(batch, self._mixed_seed(batch_idx, 1))
        if not self._apart:
            check_apart(step.context["indices"])
            self._apart = True
        terms = self.terms(step)
        if self.distiller is not None and self.global_step == 0:
            self.distiller.check_gradients()
        total = torch.stack(list(terms.values())).sum()
        self.loss_log.record(self.global_step, terms | self._logged_values(), step.images)
        if total.device.type == "cpu":
            self.loss_log.check()  # needs no synchronisation here, and prevents a step with a non-finite loss
        if (accumulated := self.trainer.accumulate_grad_batches) > 1:
            # The trainer divides by accumulate_grad_batches even in a step of fewer batches.
            total = total * (accumulated / batches_of_step(self.trainer, batch_idx))
        return total

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Run student and teacher on a batch, and return all losses, weighted, by name."""
        if self.distiller is None:
            output, losses = run(self.model, step.inputs), {}
        else:
            context = dict(step.context)
            if self.cached_teacher is not None:
                context["teacher_features"] = self.cached_teacher.features(self.distiller, step, self.current_epoch)
            compiled = self.model._compiled_call_impl is not None
            looks = self.measures_pulls and not compiled and self.pulls is None
            self.distiller.watched = looks
            # A compiled graph gives no gradients at intermediate features: batches that measure them run eagerly.
            call = self.model.forward if compiled and self.distiller.due else self.model
            output, losses = call(step.inputs, **context)
        terms = {name: self.task_weight * loss for name, loss in self.task.losses(output, step).items()}
        if terms and self.distiller is not None and (looks or self.distiller.balancer is not None):
            task = torch.stack(list(terms.values())).sum()
            norms = self._norms(task) if looks else None
            if self.distiller.training:
                losses = self.distiller.balance(losses, task)
            if norms is not None:
                weights = self.distiller.weights()
                self.pulls = {
                    name: self._method_factor * float(weights[name]) * method / of_task if of_task else math.inf
                    for name, (method, of_task) in norms.items()
                    if method or of_task
                }
        return terms | {name: self._method_factor * loss for name, loss in losses.items()}

    def _norms(self, task: Tensor) -> dict[str, tuple[float, float]] | None:
        """Return the gradient norms of method and task at the pairs' features; None if the model does not allow it."""
        if self.distiller is None:
            return None
        self.distiller.watched = self.measures_pulls = False
        try:
            return self.distiller.pulls(task)
        except RuntimeError:  # such as activation checkpointing that allows only one backward
            return None

    def _logged_values(self) -> dict[str, Tensor]:
        """Return values to log besides the losses: gammas, and weights that follow the gradients."""
        if self.distiller is None:
            return {}
        gammas = {f"gamma/{pair}": gamma for pair, gamma in self.distiller.gammas.items()}
        weights = {f"weight/{pair}": w for pair, w in self.distiller.weights().items() if isinstance(w, Tensor)}
        return gammas | weights

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update the EMA."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.student)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Every `log_every` steps: raise FloatingPointError if a loss was not finite, and log the losses."""
        if self.global_step % self.log_every == 0 and ends_step(self.trainer, batch_idx):
            self.loss_log.check()
            rate = float(self._optimizer().param_groups[0]["lr"])
            self._log({f"step/{name}": value for name, value in self.loss_log.latest().items()} | {"step/lr": rate})

    def on_validation_start(self) -> None:
        """Broadcast BatchNorm statistics, which differ between ranks, so that all ranks validate the same model."""
        broadcast_buffers(self.student)
        if self._unsharded is not None:
            self._unsharded.gather(self.student)
        # Validation alone, as in `diffkd test`, counts as the last.
        last = self.trainer.state.fn != "fit" or self.current_epoch + 1 == self.trainer.max_epochs
        self._meters = {"": self.task.meter(self.device, last=last)}
        if self.ema is not None:
            broadcast_buffers(self.ema.model)
            self._meters["_unaveraged"] = self.task.meter(self.device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics with a batch.

        Raises:
            RuntimeError: if memory runs out; names the options that help.
        """
        try:
            self._meters[""].update(self.result, batch)
            if "_unaveraged" in self._meters:
                self._meters["_unaveraged"].update(self._plain_student, batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            windows = "--segmentation.window=[512,512], " if self.task.name == "segmentation" else ""
            raise RuntimeError(
                f"out of memory while measuring {_described(batch)}: give {windows}--data.val_batch_size 1 where the "
                "data have it, or a smaller --data.batch_size"
            ) from error

    def on_after_backward(self) -> None:
        """Check for trainable parameters without a gradient, for which DDP would wait.

        Raises:
            ValueError: in the first step; names the parameters.
        """
        if self.global_step or not several_processes() or self._unsharded is not None:
            return
        strategy: Any = self.trainer.strategy
        if getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters"):
            return
        idle = [name for name, one in self.named_parameters() if one.requires_grad and one.grad is None]
        if idle:
            more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
            raise ValueError(
                f"{', '.join(idle[:5])}{more} got no gradient from the first step, and several processes wait for "
                "those of all parameters: freeze them by requires_grad_(False), or give --strategy "
                "ddp_find_unused_parameters_true"
            )

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics over all images of all ranks."""
        self._measured = self._meters[""].compute()
        if "_unaveraged" in self._meters:
            score = self.task.headlines[0]
            self._measured[f"{score}_unaveraged"] = self._meters["_unaveraged"].compute()[score]
        self._meters = {}
        # For callbacks, such as early stopping; loggers get the whole row at the end of the epoch.
        known = {name: value for name, value in self._measured.items() if not name.startswith("iou/")}
        self.log_dict(known, logger=False, sync_dist=several_processes())

    @property
    def measured(self) -> Row:
        """The metrics of the last validation, such as "top1" and "loss"."""
        return dict(self._measured)

    def on_train_epoch_end(self) -> None:
        """Add the epoch's row to the history: mean losses, gammas and weights, metrics."""
        self.loss_log.check()
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now
        row = {
            "epoch": self.current_epoch + 1,
            "step": self.global_step,
            **self._measured,
            **{
                name if name.startswith(("gamma/", "weight/")) else f"train/{name}": mean
                for name, mean in self.loss_log.means().items()
            },
            "lr": float(self._optimizer().param_groups[0]["lr"]),
            "seconds": round(self._seconds, 3),
        }
        self.history.add(row)
        self._log({f"epoch/{name}": value for name, value in row.items()})
        self.loss_log.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add state that is not in the state dict: EMA, history, pulls, and the loss sums of an unfinished epoch."""
        # In mid-epoch these weights have not been validated.
        measured = (None, f"step {self.global_step}") if self.loss_log.count else (self.history.last, "checkpoint")
        checkpoint["diffkd"] = {
            "student": "model.student." if self.distiller is not None else "model.",
            "average": None if self.ema is None else self.ema.state_dict(),
            "history": self.history.state_dict(),
            "ledger": self.loss_log.state_dict(),
            # Not the losses' number: an optimiser may call for those of a batch several times.
            "batches": self.trainer.fit_loop.batch_idx + 1 if self.loss_log.count else 0,
            "card": with_metrics(self.card, *measured),
            "samples": self._samples,
            "pulls": self.pulls,
            "seconds": self._seconds + time.monotonic() - self._since,
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the state from :meth:`on_save_checkpoint`; raise ValueError if the data have other classes."""
        state = checkpoint["diffkd"]
        if self.card and "classes" in state["card"]:
            check_classes(state["card"]["classes"], self.card["classes"])
        self._samples = state.get("samples", {})
        self.pulls = state.get("pulls")
        if self.ema is not None:
            self.ema.load_state_dict(state["average"])
        self.history.load_state_dict(state["history"])
        self.loss_log.load_state_dict(state["ledger"])
        self._seconds = state["seconds"]
        skipped = state.get("batches", self.loss_log.count)
        data = getattr(self.trainer, "datamodule", None)
        if starts_within_epochs(data):
            data.start_batch = skipped  # type: ignore[union-attr]
        elif skipped:
            raise ValueError(
                f"the checkpoint was saved after batch {skipped} of an epoch, but {type(data).__name__} has no "
                "start_batch to go on from there: give it one, or another --out"
            )

    @property
    def _plain_student(self) -> nn.Module:
        return self.student if self._unsharded is None else self._unsharded.model

    def _mixed_seed(self, batch: int, *what: int) -> int:
        within = batch - first_of_step(self.trainer, batch)
        seed = mix_seed(self.seed, within) if within else self.seed
        return mix_seed(seed, self.global_step, self.global_rank, *what)

    def _optimizer(self) -> Optimizer:
        return self.trainer.optimizers[0]

    def _log(self, values: Mapping[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(values), step=self.global_step)
