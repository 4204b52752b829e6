"""Loggers and callbacks of Lightning by name, and sample predictions as pictures for all of them."""

import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks, loggers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from diffkd.inference.pictures import classes_found, draw_prediction, side_by_side, to_image
from diffkd.inference.results import above
from diffkd.methods.inputs import like_parameters
from diffkd.models.extras import nearest
from diffkd.models.segmenters.any_size import AnySize, upsample
from diffkd.tasks.classification import class_scores, logits_of
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.task import Task
from diffkd.training.lightning_module import Training

Described = str | Mapping[str, Any]
"""A logger or callback by its name, such as "csv", or {"class_path": name, "init_args": {...}}."""

_SECRET = ("api_key", "token", "password")
_INSTALL = {"wandb": "wandb", "mlflow": "mlflow", "comet": "comet-ml", "lit": "litlogger"}


class EventLog(TensorBoardLogger):
    """TensorBoard's log of a run; the training goes on without it, with a warning, if it cannot be written.

    Args:
        folder: the folder of the run; the log is in its folder `tensorboard`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="tensorboard")
        self._failed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write values of a step."""
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        """Write the hyperparameters."""
        self._try(super().log_hyperparams, *args, **options)

    def save(self) -> None:
        """Write what has been logged."""
        self._try(super().save)

    def finalize(self, status: str) -> None:
        """Close the log."""
        self._try(super().finalize, status)

    @property
    def experiment(self) -> Any:
        """Return TensorBoard's writer, None after a failure."""
        try:
            return None if self._failed else super().experiment
        except OSError as error:
            self._give_up(error)
            return None

    def _try(self, write: Callable[..., Any], *args: Any, **options: Any) -> None:
        if self._failed:
            return
        try:
            write(*args, **options)
        except (OSError, ValueError) as error:  # Lightning makes ValueErrors of those that occur in a log of metrics
            cause = error.__cause__ or error
            if not isinstance(cause, OSError):
                raise
            self._give_up(cause)

    def _give_up(self, error: OSError) -> None:
        self._failed = True
        rank_zero_warn(
            f"{self.log_dir} cannot be written ({error.strerror or error}): the training goes on without this log; "
            "metrics.csv and the checkpoints are not concerned"
        )


def build_loggers(described: Any, folder: Path) -> list[Logger]:
    """Build loggers by name.

    Args:
        described: one or a list of names ("tensorboard", "csv", "wandb", "mlflow", "comet"), class paths, mappings with
            "class_path" and "init_args", or loggers; None: TensorBoard. A resumed run writes its CSV file beside the
            earlier ones: "csv", then "csv-2" and so on.
        folder: of the run, where they write, unless their arguments say otherwise.

    Raises:
        ValueError: if there is no such logger, it is none, or it does not take the arguments.
        ModuleNotFoundError: if its library is not installed.
    """
    if described is None:
        return [EventLog(folder)]
    known = {name.removesuffix("Logger").lower(): name for name in loggers.__all__ if name != "Logger"}
    return [_built(one, "logger", Logger, loggers, known, folder) for one in _listed(described)]


def build_callbacks(described: Any) -> list[Callback]:
    """Build callbacks by name.

    Args:
        described: one or a list of names, such as "EarlyStopping", class paths, mappings with "class_path" and
            "init_args", or callbacks; None: none.

    Raises:
        ValueError: if there is no such callback, it is none, or it does not take the arguments.
    """
    known = {name.lower(): name for name in callbacks.__all__ if name != "Callback"}
    return [_built(one, "callbacks", Callback, callbacks, known, None) for one in _listed(described or [])]


def check_monitored(given: Sequence[Callback], task: Task) -> None:
    """Check what EarlyStopping and ModelCheckpoint watch, before an epoch is spent on it.

    Raises:
        ValueError: if a metric is watched for its smallest value though larger is better, or is not measured; a
            callback of your own may measure others.
    """
    watching = [one for one in given if isinstance(one, callbacks.EarlyStopping | callbacks.ModelCheckpoint)]
    own = any(not type(one).__module__.startswith("lightning.") for one in given)
    for one in watching:
        if one.monitor is None:
            continue
        name, metric = type(one).__name__, one.monitor.removesuffix("_unaveraged").partition("/")[0]
        if metric not in task.metrics and not own:
            raise ValueError(
                f"--callbacks: {name} watches {one.monitor!r}, which is not measured: give monitor one of "
                f"{', '.join(task.metrics)}"
            )
        if metric in task.metrics and metric != "loss" and one.mode == "min":
            raise ValueError(
                f"--callbacks: {name} watches {one.monitor} for its smallest value, and larger is better: add mode: max"
            )


def _listed(described: Any) -> Sequence[Any]:
    return list(described) if isinstance(described, (list, tuple)) else [described]


def _built(one: Any, what: str, base: type, home: Any, known: Mapping[str, str], folder: Path | None) -> Any:
    if isinstance(one, base):
        return one
    values: Any = {"class_path": one} if isinstance(one, str) else one
    if not isinstance(values, Mapping) or not isinstance(values.get("class_path"), str):
        raise ValueError(f"--{what} {one!r} names no {base.__name__}: give a name, or class_path and init_args")
    if extra := sorted(set(values) - {"class_path", "init_args"}):
        raise ValueError(f"--{what}: {extra[0]!r} is neither class_path nor init_args: put options into init_args")
    name, given = values["class_path"], dict(values.get("init_args") or {})
    kind = _class_of(name, what, base, home, known)
    parameters = inspect.signature(kind).parameters
    free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in given:
        if option in _SECRET:
            raise ValueError(
                f"--{what}: {option} of {name} would be recorded with the run: give it by the library's own "
                "environment variable or login"
            )
        if option not in parameters and not free:
            raise ValueError(f"--{what}: {name} has no option {option!r}; {nearest(option, list(parameters))}")
    if folder is not None:
        given = _places(kind.__name__, folder) | given
    try:
        return _beside_earlier_rows(kind, given) if issubclass(kind, CSVLogger) else kind(**given)
    except ModuleNotFoundError as error:
        short = kind.__name__.removesuffix("Logger").lower()
        library = _INSTALL.get(short, error.name or "a library")
        raise ModuleNotFoundError(
            f"--{what} {name} needs {library}, which is not installed: pip install {library}", name=error.name
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"--{what}: {name} cannot be made ({error}): give what it needs as init_args") from error


def _beside_earlier_rows(kind: type[CSVLogger], given: dict[str, Any]) -> CSVLogger:
    """Build a CSV logger of the first version that has no file yet, such as "csv-2": it would delete the file."""
    logger, number = kind(**given), 2
    first = Path(logger.log_dir).name
    while given.get("version") is not None and Path(logger.log_dir, "metrics.csv").is_file():
        logger = kind(**given | {"version": f"{first}-{number}"})
        number += 1
    return logger


def _class_of(name: str, what: str, base: type, home: Any, known: Mapping[str, str]) -> Any:
    module, _, last = name.rpartition(".")
    if not module:
        short = last.lower().removesuffix("logger") if base is Logger else last.lower()
        if short not in known:
            names = ", ".join(known) if base is Logger else ", ".join(known.values())
            raise ValueError(f"--{what}: there is no {name!r}; there are {names}, or give a class path")
        return getattr(home, known[short])
    try:
        kind = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--{what}: there is no {name!r} ({error}): write package.module.Name, of a module that is installed or "
            "whose folder is on PYTHONPATH"
        ) from error
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise ValueError(f"--{what}: {name} is no {base.__name__} of Lightning: name a class that is one")
    return kind


def _places(kind: str, folder: Path) -> dict[str, Any]:
    """Return the arguments by which a logger writes into the folder of the run."""
    match kind:
        case "TensorBoardLogger":
            return {"save_dir": folder, "name": "", "version": "tensorboard"}
        case "CSVLogger":
            return {"save_dir": folder, "name": "", "version": "csv"}
        case "WandbLogger":
            return {"save_dir": folder, "name": folder.name, "project": "diffkd"}
        case "MLFlowLogger":
            place = {"experiment_name": "diffkd", "run_name": folder.name}
            if os.environ.get("MLFLOW_TRACKING_URI") is None:
                store = folder.absolute()
                place |= {
                    "tracking_uri": f"sqlite:///{store / 'mlflow.db'}",
                    "artifact_location": (store / "mlflow").as_uri(),
                }
            return place
        case "CometLogger":
            return {"project": "diffkd"}
        case _:
            return {}


class SamplePictures(Callback):
    """Draws the student's predictions for the first evaluation images, into a folder and for all loggers.

    Args:
        folder: for `epoch-0001.png` and so on.
        facts: of the data.
        every: epochs between two pictures; the last epoch is always drawn.
        count: number of images.

    Raises:
        ValueError: if a number is less than 1, or the data are for representations, which predict nothing to draw.
    """

    def __init__(self, folder: Path, facts: DataFacts, every: int, count: int = 8) -> None:
        if every < 1 or count < 1:
            raise ValueError(f"sample_every={every} is no number of epochs: give at least 1, or leave it out")
        if facts.task == "representation":
            raise ValueError(f"sample_every={every} draws predictions, and a representation makes none: leave it out")
        self.folder, self.facts, self.every, self.count = folder, facts, every, count
        self._batch: Any = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first batch."""
        if batch_idx == 0 and trainer.is_global_zero:
            self._batch = [part[: self.count] for part in batch]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, if it is the epoch's turn."""
        epoch = trainer.current_epoch + 1
        due = epoch % self.every == 0 or epoch == trainer.max_epochs
        if not isinstance(pl_module, Training) or self._batch is None or not due or trainer.sanity_checking:
            return
        picture = draw_samples(pl_module.result, self.facts, self._batch)
        self._batch = None
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"epoch-{epoch:04d}.png"
        picture.save(file)
        for logger in trainer.loggers:
            try:
                log_picture(logger, picture, trainer.global_step)
            except Exception as error:  # a tracker that fails must not end the training
                rank_zero_warn(
                    f"{type(logger).__name__} did not take the sample predictions ({error}); they are in {file}"
                )


def draw_samples(model: Any, facts: DataFacts, batch: Any) -> Any:
    """Return a picture of a model's predictions for a batch, each beside the truth.

    Args:
        model: in evaluation mode.
        facts: of the data.
        batch: as for the task.
    """
    images, targets, _ = batch
    pictures = []
    with torch.no_grad():
        if facts.task == "detection":
            outputs = model([like_parameters(image, model) for image in images])
            found = [above({name: one[name].cpu() for name in ("boxes", "scores", "labels")}, 0.3) for one in outputs]
            truth = [{name: target[name].cpu() for name in ("boxes", "labels")} for target in targets]
        elif facts.task == "segmentation":
            logits = AnySize(model).eval()(like_parameters(images, model)).float()
            ids = upsample(logits, (targets.shape[1], targets.shape[2])).argmax(dim=1).cpu()
            found = [{"ids": one} for one in ids]
            truth = [{"ids": torch.where(one == facts.ignore_index, -1, one)} for one in targets.cpu()]
        else:
            logits = logits_of(model(like_parameters(images, model)))
            scores = class_scores(logits, multi_label=facts.multi_label).cpu()
            found, truth = [{"scores": one} for one in scores], []
    for index, (image, one) in enumerate(zip(images, found, strict=True)):
        shown = to_image(image, facts.mean, facts.std)
        if "ids" in one:
            shown = shown.resize((one["ids"].shape[1], one["ids"].shape[0]))
        caption = classes_found(one["scores"], facts.classes, 0.5) if facts.multi_label else None
        row = [draw_prediction(shown, one, facts.classes, caption=caption)]
        if truth:
            row.append(draw_prediction(shown, truth[index], facts.classes))
        pictures.append(side_by_side(row))
    columns = 4 if facts.task == "classification" else 2
    rows = [side_by_side(pictures[start : start + columns]) for start in range(0, len(pictures), columns)]
    return side_by_side(rows, down=True)


def log_picture(logger: Logger, picture: Any, step: int, name: str = "samples") -> None:
    """Give a picture to a logger that takes pictures: TensorBoard, W&B, MLflow, Comet; others are left alone.

    Args:
        logger: the logger.
        picture: in RGB.
        step: of the training.
        name: of the picture there.
    """
    owner: Any = logger
    experiment: Any = getattr(owner, "experiment", None)
    if hasattr(owner, "log_image"):  # W&B
        owner.log_image(key=name, images=[picture], step=step)
    elif hasattr(experiment, "add_image"):  # TensorBoard
        pixels: Tensor = pil_to_tensor(picture)
        experiment.add_image(name, pixels, step)
    elif hasattr(experiment, "log_artifact") and (run := getattr(logger, "run_id", None)):  # MLflow
        experiment.log_image(run, picture, artifact_file=f"{name}/step-{step:08d}.png")
    elif hasattr(experiment, "log_image"):  # Comet
        experiment.log_image(picture, name=name, step=step)
