"""The LightningModule that trains a student on any task, alone or with its teacher, and measures it."""

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
from diffkd.features.calling import run
from diffkd.files.history import History, Row
from diffkd.tasks.data_facts import check_classes, check_samples, describe_samples
from diffkd.tasks.distributed import WholeStudent, broadcast_buffers, several_processes, shard, shards
from diffkd.tasks.task import Meter, Step, Task
from diffkd.training.cached_teacher import CachedTeacher
from diffkd.training.ema import StudentAverage
from diffkd.training.loss_log import Ledger
from diffkd.training.optimization import OptimizerFactory, Schedule, build_optimizer, set_learning_rate


def first_of_step(trainer: Trainer, batch: int) -> int:
    """Return the first batch of the step that a batch of the epoch belongs to, both counted from 0."""
    return batch - batch % trainer.accumulate_grad_batches


def ends_step(trainer: Trainer, batch: int) -> bool:
    """Whether the optimiser steps after this batch of the epoch."""
    return (batch + 1) % trainer.accumulate_grad_batches == 0 or batch + 1 == trainer.num_training_batches


def batches_of_step(trainer: Trainer, batch: int) -> int:
    """Return how many batches the step has that a batch belongs to: the last one of an epoch may have fewer."""
    left = trainer.num_training_batches - first_of_step(trainer, batch)
    return int(min(trainer.accumulate_grad_batches, left))


def steps_per_epoch(trainer: Trainer) -> int:
    """Return how often the optimiser steps in an epoch."""
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


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
    """Trains a student and measures it after every epoch.

    The loss is `task_weight * task's losses + method_weight * sum of the distiller's losses` (Eq. 9 of the DiffKD
    paper; the distiller's own weights are inside the sum).

    All that a step draws at random follows from (seed, step, rank), and the learning rate from the step alone, so that
    an interrupted training goes on without the state of any random generator. Where the trainer accumulates gradients,
    a step is the mean over its batches, each of which counts the same.

    Args:
        model: a :class:`~diffkd.Distiller`, or a plain student to train without a teacher.
        task: what a batch, a loss and a measurement are.
        optimizer: makes the optimiser from parameter groups, such as `partial(torch.optim.SGD, lr=0.1)`.
        schedule: factor of the learning rate by epoch.
        epochs: length of the training, which the schedule is stretched to.
        decay_all: see :func:`~diffkd.training.optimization.build_optimizer`.
        task_weight: factor of the task's losses.
        method_weight: factor of all distillation losses.
        method_ramp: when in the training they count.
        ema: decay of a running average of the student, which is then what is measured and saved; None: no average.
        seed: of everything that a step draws.
        log_every: steps between two looks at the losses. In between nothing waits for the device.
        teacher: the whole teacher, from the student's images to its output, to be judged at the start; None: the
            distiller's.
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
        self.epochs = epochs
        self.optimizer_factory, self.schedule, self.decay_all = optimizer, schedule, decay_all
        self.task_weight, self.method_weight, self.method_ramp = task_weight, method_weight, method_ramp
        self._method_factor = method_weight
        self.seed, self.log_every = seed, log_every
        self._teacher = [teacher]  # in a list, since a teacher is no part of what is trained
        self.average = None if ema is None else StudentAverage(self.student, ema)
        self._whole: WholeStudent | None = None
        self.ledger, self.history = Ledger(), History(task.headlines[0])
        self.card: dict[str, Any] = {}
        self.notes: list[str] = []  # of how the models were built, for the report at the start
        self._samples: dict[str, Any] = {}
        self.cached_teacher: CachedTeacher | None = None
        self.measures_pulls = False
        self.pulls: dict[str, float] | None = None
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
        """The model that is measured and saved: the average of the student if there is one, the student otherwise."""
        return self._plain_student if self.average is None else self.average.model

    @property
    def teacher(self) -> Callable[[Any], Any] | None:
        """What turns the student's images into the teacher's output; None without a teacher."""
        if self._teacher[0] is not None or self.distiller is None:
            return self._teacher[0]
        return self.distiller.teach

    def configure_model(self) -> None:
        """Spread the parameters over the processes, if that is the trainer's strategy."""
        if self.distiller is not None and self.distiller.balancer is not None and shards(self.trainer):
            raise ValueError(
                "a Balance measures gradients at whole features, which strategy fsdp does not give: take ddp, or a "
                "number as the pair's weight"
            )
        if self._whole is None and shards(self.trainer):
            self.trainer.precision_plugin.convert_module(self.model)
            self._whole = WholeStudent(self.student)
            shard(self.model, self.trainer.strategy.root_device, self.trainer.world_size)

    def configure_optimizers(self) -> Optimizer:
        """Build the optimiser over everything trainable, and make sure that nothing is missed."""
        optimizer = build_optimizer(self.model, self.optimizer_factory, decay_all=self.decay_all)
        if self.distiller is not None:
            self.distiller.check_optimizer(optimizer)
        return optimizer

    def on_fit_start(self) -> None:
        """Move the student's copies to its device."""
        for copied in (self.average, self._whole):
            if copied is not None:
                copied.model.to(self.device)
        self._since = time.monotonic()

    def on_train_start(self) -> None:
        """Refuse to go on with other samples than the training began with."""
        samples = describe_samples(self.trainer.train_dataloader)
        check_samples(self._samples, samples)
        self._samples = samples

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate and the random generators, both from the step alone."""
        begun = first_of_step(self.trainer, batch_idx)
        epoch = self.current_epoch + begun / self.trainer.num_training_batches
        set_learning_rate(self._optimizer(), self.schedule(epoch, self.epochs))
        self._method_factor = self.method_weight * self.method_ramp(epoch)
        if self.distiller is not None:
            self.distiller.set_epoch(epoch)
        torch.manual_seed(self._mixed_seed(batch_idx))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the weighted sum of all losses of a batch."""
        step = self.task.step(batch, self._mixed_seed(batch_idx, 1))
        terms = self.terms(step)
        if self.distiller is not None and self.global_step == 0:
            self.distiller.check_gradients()
        total = torch.stack(list(terms.values())).sum()
        self.ledger.record(self.global_step, terms | self._beside(), step.images)
        if total.device.type == "cpu":
            self.ledger.check()  # costs nothing here, and the broken step is not taken
        if (accumulated := self.trainer.accumulate_grad_batches) > 1:
            # The trainer divides by the number it was given, in a step of fewer batches too.
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
            # A graph does not show gradients at what is inside: there, a batch that is measured runs without it.
            call = self.model.forward if compiled and self.distiller.due else self.model
            output, losses = call(step.inputs, **context)
        terms = {name: self.task_weight * loss for name, loss in self.task.losses(output, step).items()}
        if self.distiller is not None and (looks or self.distiller.balancer is not None):
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
        """Return the gradient norms of method and task at the pairs' features; None where a model does not give any."""
        if self.distiller is None:
            return None
        self.distiller.watched = self.measures_pulls = False
        try:
            return self.distiller.pulls(task)
        except RuntimeError:  # such as checkpointing that allows of one backward alone
            return None

    def _beside(self) -> dict[str, Tensor]:
        """Return what is logged beside the losses: gammas, and weights that follow the gradients."""
        if self.distiller is None:
            return {}
        gammas = {f"gamma/{pair}": gamma for pair, gamma in self.distiller.gammas.items()}
        weights = {f"weight/{pair}": w for pair, w in self.distiller.weights().items() if isinstance(w, Tensor)}
        return gammas | weights

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then average."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update(self.student)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Every `log_every` steps: stop if a loss was not finite, and write the losses to the log."""
        if self.global_step % self.log_every == 0 and ends_step(self.trainer, batch_idx):
            self.ledger.check()
            rate = float(self._optimizer().param_groups[0]["lr"])
            self._log({f"step/{name}": value for name, value in self.ledger.latest().items()} | {"step/lr": rate})

    def on_validation_start(self) -> None:
        """Let all processes measure the same model: BatchNorm's statistics differ between them."""
        broadcast_buffers(self.student)
        if self._whole is not None:
            self._whole.gather(self.student)
        self._meters = {"": self.task.meter(self.device)}
        if self.average is not None:
            broadcast_buffers(self.average.model)
            self._meters["_unaveraged"] = self.task.meter(self.device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure a batch.

        Raises:
            RuntimeError: if the memory does not suffice; names the options that help.
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
        """Refuse parameters without a gradient where several processes wait for all of them.

        Raises:
            ValueError: after the first step; names them.
        """
        if self.global_step or not several_processes() or self._whole is not None:
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
        """Compute the measurements over all images of all processes."""
        self._measured = self._meters[""].compute()
        if "_unaveraged" in self._meters:
            score = self.task.headlines[0]
            self._measured[f"{score}_unaveraged"] = self._meters["_unaveraged"].compute()[score]
        self._meters = {}

    @property
    def measured(self) -> Row:
        """The measurements of the last validation, such as "top1" and "loss"."""
        return dict(self._measured)

    def on_train_epoch_end(self) -> None:
        """Close the epoch's row: mean losses, gammas and weights, measurements."""
        self.ledger.check()
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now
        row = {
            "epoch": self.current_epoch + 1,
            "step": self.global_step,
            **self._measured,
            **{
                name if name.startswith(("gamma/", "weight/")) else f"train/{name}": mean
                for name, mean in self.ledger.means().items()
            },
            "lr": float(self._optimizer().param_groups[0]["lr"]),
            "seconds": round(self._seconds, 3),
        }
        self.history.add(row)
        self._log({f"epoch/{name}": value for name, value in row.items()})
        self.ledger.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the state dict does not hold: average, history, and the sums of an unfinished epoch."""
        # In mid-epoch these weights have not been measured.
        measured = (None, f"step {self.global_step}") if self.ledger.count else (self.history.last, "checkpoint")
        checkpoint["diffkd"] = {
            "student": "model.student." if self.distiller is not None else "model.",
            "average": None if self.average is None else self.average.state_dict(),
            "history": self.history.state_dict(),
            "ledger": self.ledger.state_dict(),
            "card": with_metrics(self.card, *measured),
            "samples": self._samples,
            "seconds": self._seconds + time.monotonic() - self._since,
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over what :meth:`on_save_checkpoint` added; raise ValueError if the data have other classes."""
        state = checkpoint["diffkd"]
        if self.card and "classes" in state["card"]:
            check_classes(state["card"]["classes"], self.card["classes"])
        self._samples = state.get("samples", {})
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.history.load_state_dict(state["history"])
        self.ledger.load_state_dict(state["ledger"])
        self._seconds = state["seconds"]
        skipped = self.ledger.count
        data = getattr(self.trainer, "datamodule", None)
        if skipped and not hasattr(data, "start_batch"):
            raise ValueError(
                f"the checkpoint was saved after batch {skipped} of an epoch, but {type(data).__name__} has no "
                "start_batch to go on from there; give it one, or save at the end of epochs only"
            )
        if data is not None:
            data.start_batch = skipped

    @property
    def _plain_student(self) -> nn.Module:
        return self.student if self._whole is None else self._whole.model

    def _mixed_seed(self, batch: int, *what: int) -> int:
        within = batch - first_of_step(self.trainer, batch)
        seed = mix_seed(self.seed, within) if within else self.seed
        return mix_seed(seed, self.global_step, self.global_rank, *what)

    def _optimizer(self) -> Optimizer:
        return self.trainer.optimizers[0]

    def _log(self, values: Mapping[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(values), step=self.global_step)
