"""Image classification: cross entropy, distillation losses if there is a teacher, top-1 and top-5 accuracy."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from diffkd.data.mixing import mix
from diffkd.data.seeding import mix_seed
from diffkd.distiller import Distiller
from diffkd.layout import select_tensor
from diffkd.ramp import ALWAYS, Ramp
from diffkd.tasks.average import StudentAverage
from diffkd.tasks.card import with_metrics
from diffkd.tasks.history import History, Row
from diffkd.tasks.ledger import Ledger
from diffkd.tasks.optimization import OptimizerFactory, Schedule, build_optimizer, set_learning_rate
from diffkd.tasks.replicas import broadcast_buffers

Batch = tuple[Tensor, Tensor, Tensor]


class ClassificationTask(LightningModule):
    """Trains a student, alone or with its teacher, and measures it on the validation set.

    The loss is `task_weight * cross entropy + method_weight * sum of the distiller's losses` (Eq. 9 of the DiffKD
    paper; the distiller's own weights are inside the sum).

    All that a step draws at random follows from (seed, step, rank), and the learning rate from the step alone, so that
    an interrupted training goes on without the state of any random generator.

    Batches are `(images (B, C, H, W), labels (B,), indices (B,))`.

    Args:
        model: a :class:`~diffkd.Distiller`, or a plain student to train without a teacher.
        num_classes: K, length of the student's output.
        optimizer: makes the optimiser from parameter groups, such as `partial(torch.optim.SGD, lr=0.1)`.
        schedule: factor of the learning rate by epoch.
        epochs: length of the training, which the schedule is stretched to.
        decay_all: see :func:`~diffkd.tasks.optimization.build_optimizer`.
        task_weight: factor of the cross entropy.
        method_weight: factor of all distillation losses.
        method_ramp: when in the training they count.
        label_smoothing: share of the label that is spread over all classes.
        mixup, cutmix: alpha of Mixup and CutMix, 0 is off (:func:`~diffkd.data.mixing.mix`).
        ema: decay of a running average of the student, which is then what is measured and saved; None: no average.
        seed: of everything that a step draws.
        log_every: steps between two looks at the losses. In between nothing waits for the device.
    """

    def __init__(
        self,
        model: Distiller | nn.Module,
        *,
        num_classes: int,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        epochs: int,
        decay_all: bool = True,
        task_weight: float = 1.0,
        method_weight: float = 1.0,
        method_ramp: Ramp = ALWAYS,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        ema: float | None = None,
        seed: int = 0,
        log_every: int = 50,
    ) -> None:
        super().__init__()
        if epochs < 1 or log_every < 1:
            raise ValueError(f"epochs and log_every must be at least 1, got {epochs} and {log_every}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in 0..1, got {label_smoothing}")
        self.model = model
        self.num_classes, self.epochs = num_classes, epochs
        self.optimizer_factory, self.schedule, self.decay_all = optimizer, schedule, decay_all
        self.task_weight, self.method_weight, self.method_ramp = task_weight, method_weight, method_ramp
        self._method_factor = method_weight
        self.label_smoothing, self.mixup, self.cutmix = label_smoothing, mixup, cutmix
        self.seed, self.log_every = seed, log_every
        self.average = None if ema is None else StudentAverage(self.student, ema)
        self.ledger, self.history = Ledger(), History()
        self.card: dict[str, Any] = {}
        self._measured: Row = {}
        self._seconds, self._since = 0.0, time.monotonic()

        # Unchecked, since checks wait for the device; labels have been checked when the data were read.
        accuracy = partial(MulticlassAccuracy, num_classes, average="micro", validate_args=False)
        self.metrics: dict[str, Metric] = {"top1": accuracy(), "loss": MeanMetric(nan_strategy="disable")}
        if num_classes > 5:
            self.metrics["top5"] = accuracy(top_k=5)
        if self.average is not None:
            self.metrics["top1_unaveraged"] = accuracy()

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
        return self.student if self.average is None else self.average.model

    def configure_optimizers(self) -> Optimizer:
        """Build the optimiser over everything trainable, and make sure that nothing is missed."""
        optimizer = build_optimizer(self.model, self.optimizer_factory, decay_all=self.decay_all)
        if self.distiller is not None:
            self.distiller.check_optimizer(optimizer)
        return optimizer

    def on_fit_start(self) -> None:
        """Move the average to the student's device."""
        if self.average is not None:
            self.average.model.to(self.device)
        self._since = time.monotonic()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate and the random generators, both from the step alone."""
        epoch = self.current_epoch + batch_idx / self.trainer.num_training_batches
        set_learning_rate(self._optimizer(), self.schedule(epoch, self.epochs))
        self._method_factor = self.method_weight * self.method_ramp(epoch)
        if self.distiller is not None:
            self.distiller.set_epoch(epoch)
        torch.manual_seed(mix_seed(self.seed, self.global_step, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted sum of all losses of a batch."""
        images, labels, indices = batch
        targets: Tensor = labels
        if self.mixup or self.cutmix:
            seed = mix_seed(self.seed, self.global_step, self.global_rank, 1)
            images, targets = mix(images, labels, self.num_classes, mixup=self.mixup, cutmix=self.cutmix, seed=seed)
        if self.distiller is None:
            output, losses = self.model(images), {}
        else:
            output, losses = self.model(images, labels=labels, indices=indices)
        task = F.cross_entropy(logits_of(output), targets, label_smoothing=self.label_smoothing)
        terms = {"task": self.task_weight * task}
        terms.update({name: self._method_factor * loss for name, loss in losses.items()})
        total = torch.stack(list(terms.values())).sum()
        gammas = {} if self.distiller is None else self.distiller.gammas
        self.ledger.record(
            self.global_step, {**terms, **{f"gamma/{pair}": gamma for pair, gamma in gammas.items()}}, images
        )
        if images.device.type == "cpu":
            self.ledger.check()  # costs nothing here, and the broken step is not taken
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then average."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update(self.student)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Every `log_every` steps: stop if a loss was not finite, and write the losses to the log."""
        if self.global_step % self.log_every == 0:
            self.ledger.check()
            rate = float(self._optimizer().param_groups[0]["lr"])
            self._log({f"step/{name}": value for name, value in self.ledger.latest().items()} | {"step/lr": rate})

    def on_validation_start(self) -> None:
        """Let all processes measure the same model: BatchNorm's statistics differ between them."""
        for metric in self.metrics.values():
            metric.to(self.device)
        broadcast_buffers(self.student)
        if self.average is not None:
            broadcast_buffers(self.average.model)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the hits of a batch."""
        images, labels, _ = batch
        logits = _logits(self.result, images)
        self.metrics["top1"].update(logits, labels)
        if "top5" in self.metrics:
            self.metrics["top5"].update(logits, labels)
        self.metrics["loss"].update(F.cross_entropy(logits.float(), labels, reduction="none"))
        if self.average is not None:
            self.metrics["top1_unaveraged"].update(_logits(self.student, images), labels)

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics over all images of all processes."""
        self._measured = {}
        for name, metric in self.metrics.items():
            self._measured[name] = float(metric.compute())
            metric.reset()

    @property
    def measured(self) -> Row:
        """The metrics of the last validation: "top1", "top5" and "loss", accuracies in 0..1."""
        return dict(self._measured)

    def on_train_epoch_end(self) -> None:
        """Close the epoch's row: mean losses, mean gamma, accuracy."""
        self.ledger.check()
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now
        row = {
            "epoch": self.current_epoch + 1,
            "step": self.global_step,
            **self._measured,
            **{
                name if name.startswith("gamma/") else f"train/{name}": mean
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
        checkpoint["diffkd"] = {
            "student": "model.student." if self.distiller is not None else "model.",
            "average": None if self.average is None else self.average.state_dict(),
            "history": self.history.state_dict(),
            "ledger": self.ledger.state_dict(),
            "card": with_metrics(self.card, self.history.last, "checkpoint"),
            "seconds": self._seconds + time.monotonic() - self._since,
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over what :meth:`on_save_checkpoint` added."""
        state = checkpoint["diffkd"]
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

    def _optimizer(self) -> Optimizer:
        return self.trainer.optimizers[0]

    def _log(self, values: Mapping[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(values), step=self.global_step)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Run `model` on images brought to its type, since an average is in float32 whatever the student is in."""
    parameter = next(model.parameters(), images)
    return logits_of(model(images.to(parameter.dtype)))


def logits_of(output: Any) -> Tensor:
    """Return the class scores (B, K) in a model's output: a tensor, a tuple, a mapping, or an object with `logits`.

    Raises:
        TypeError: if there are none.
    """
    tensor = select_tensor(output)
    if tensor is None or tensor.ndim != 2:
        shape = "no tensor" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
        raise TypeError(f"the student returned {shape}; a classifier must return logits (B, classes)")
    return tensor
