"""`diffkd plot`: draw the figures of a run from its last checkpoint."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import Tensor

from diffkd.commands.step_cost import training_of
from diffkd.distill.distiller import Distiller
from diffkd.distill.observation import Observation
from diffkd.files.history import read_csv
from diffkd.files.run_folder import RunFolder
from diffkd.files.weights import unwrap
from diffkd.reports.plots import saliency
from diffkd.reports.run_figures import draw_curves, draw_gammas, draw_saliency, draw_scores
from diffkd.tasks.classification import Classification, class_scores
from diffkd.tasks.task import Task
from diffkd.training.checkpointing import read_checkpoint
from diffkd.training.lightning_module import Training


def plot(
    run: str,
    *,
    out: Path | None = None,
    images: int = 6,
    gammas: int = 1000,
    progress: bool = True,
    trust: list[str] | None = None,
) -> list[Path]:
    """Draw the curves of a run, and features and predictions of student, teacher and methods on evaluation images.

    Student and methods are those of the last checkpoint, in evaluation mode; the noise has a fixed seed. With an
    average of the student's weights (EMA), the student is the averaged one, which the run's scores are of.

    Args:
        run: folder of a run.
        out: folder for the figures; None: `figures` in the run's folder.
        images: number of evaluation images to show, of different classes for classification.
        gammas: number of evaluation images for the histograms of gamma.
        progress: print the files written.
        trust: files and modules of your own whose code the run's config.yaml may name; may be repeated.

    Returns:
        The files: `course.png`; for a distillation also `looks-PAIR.png` per pair of feature maps, `scores-PAIR.png`
        for logits of a classifier, and with DiffKD `gamma.png`.

    Raises:
        FileNotFoundError: if there is no run of at least one epoch.
        ValueError: if its models cannot be built again, or the checkpoint does not fit them.
    """
    if images < 1 or gammas < 1:
        raise ValueError(f"images and gammas must be at least 1, got {images} and {gammas}")
    folder = RunFolder(run)
    training, data = saved_training(folder, trust or ())
    out = folder.path / "figures" if out is None else out
    console = Console(quiet=not progress)
    drawn: list[Path] = []

    def note(path: Path) -> None:
        drawn.append(path)
        console.print(str(path), highlight=False, soft_wrap=True)

    note(draw_curves(out / "course.png", read_csv(folder.metrics), training.task.headlines[0]))
    for path in plot_training(training, data, out, images=images, gammas=gammas):
        note(path)
    return drawn


def plot_training(
    training: Training, data: LightningDataModule, out: Path, *, images: int = 6, gammas: int = 1000
) -> list[Path]:
    """Draw features and predictions of student, teacher and methods on evaluation images; none without a teacher.

    Args:
        training: from :func:`saved_training`; it is moved to the accelerator, if there is one.
        data: its data.
        out: folder for the figures.
        images: number of images to show.
        gammas: number of images for the histograms of gamma.

    Returns:
        The files, as of :func:`plot`.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    training.to(device or "cpu").eval()
    if training.distiller is None:
        return []
    data.setup("validate")
    batches = (batch[:3] for batch in data.val_dataloader())  # without the kind of images, which some have
    first = next(batches)
    drawn = _draw_pairs(training, first, _chosen(first, images), getattr(data, "classes", ()), out)
    if found := _gammas(training, itertools.chain([first], batches), gammas):
        drawn.append(draw_gammas(out / "gamma.png", found))
    return drawn


def saved_training(folder: RunFolder, trust: Sequence[str] = ()) -> tuple[Training, LightningDataModule]:
    """Rebuild the training module and the data of a run, and load the last checkpoint.

    The student gets the averaged weights (EMA) if there are any, as in what the run has measured and saved.

    Args:
        folder: folder of the run.
        trust: files and modules whose code its config.yaml may name.

    Raises:
        FileNotFoundError: if the run has not finished an epoch.
        ValueError: if its models cannot be built again, or the checkpoint does not fit them.
        UsageError: if its config.yaml names code that is not trusted.
    """
    for file in (folder.config, folder.metrics, folder.checkpoint):
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}; give the folder of a run that ended an epoch")
    training, data = training_of([f"--config={folder.config}", *(f"--trust={name}" for name in trust)])
    checkpoint = read_checkpoint(folder.checkpoint)
    average = checkpoint["diffkd"]["average"]
    try:
        training.load_state_dict(checkpoint["state_dict"])
        if average is not None:
            unwrap(training.student).load_state_dict(average["model"])
            if training.ema is not None:
                training.ema.load_state_dict(average)
    except RuntimeError as error:
        mismatch = str(error).splitlines()[-1].strip()[:200]
        raise ValueError(
            f"{folder.checkpoint} does not fit the models that {folder.config} names, so one of them has changed since "
            f"({mismatch}): take the run's own configuration and code"
        ) from error
    return training, data


def _observe(training: Training, batch: Any) -> tuple[Any, dict[str, Observation]]:
    """Return the images of a batch, and the observations of all pairs."""
    task: Task = training.task
    if isinstance(task, Classification):
        task = replace(task, mixup=0.0, cutmix=0.0)
    distiller = training.distiller
    assert isinstance(distiller, Distiller)
    step = task.step(training.transfer_batch_to_device(batch, training.device, 0), 0)
    with torch.no_grad():
        return batch[0], distiller.observe(step.inputs, **step.context)


def _chosen(batch: Any, count: int) -> list[int]:
    """Return the indices of images to show: the first ones, with as many classes as possible."""
    images, labels, _ = batch
    if isinstance(labels, Tensor) and labels.ndim == 1:
        firsts = [labels.tolist().index(label) for label in set(labels.tolist())]
        rest = [index for index in range(len(images)) if index not in firsts]
        return sorted([*firsts, *rest][:count])
    return list(range(min(count, len(images))))


def _draw_pairs(training: Training, batch: Any, chosen: list[int], classes: tuple[str, ...], out: Path) -> list[Path]:
    images: list[Tensor] = []
    features: dict[str, dict[str, list[Tensor]]] = {}
    for index in chosen:
        torch.manual_seed(index)
        shown, seen = _observe(training, [part[index : index + 1] for part in batch])
        images.append(shown[0])
        for name, sides in _sides(seen):
            for title, feature in sides.items():
                features.setdefault(name, {}).setdefault(title, []).append(feature.float().cpu())
    paths = []
    for name, columns in features.items():
        file = re.sub(r"[^\w.]+", "-", name).strip("-")
        shape = columns["teacher"][0].shape
        if len(shape) == 4:
            maps = {title: [saliency(one)[0] for one in seen] for title, seen in columns.items()}
            paths.append(draw_saliency(out / f"looks-{file}.png", images, maps))
        elif training.task.name == "classification" and shape[1] == len(classes):
            several = getattr(training.task, "multi_label", False)
            scores = {title: class_scores(torch.cat(seen), multi_label=several) for title, seen in columns.items()}
            paths.append(draw_scores(out / f"scores-{file}.png", images, scores, classes))
    return paths


def _sides(seen: Mapping[str, Observation]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield for each pair and level the features to show by title, with the teacher's last."""
    for name, (student, teacher, result) in seen.items():
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            yield name, _titled(student, teacher, result)
        else:
            results = getattr(result, "results", [None] * len(student))
            for level, sides in enumerate(zip(student, teacher, results, strict=True)):
                yield f"{name}-{level}", _titled(*sides)


def _titled(student: Tensor, teacher: Tensor, result: Any) -> dict[str, Tensor]:
    if not hasattr(result, "denoised"):
        return {"student": student, "teacher": teacher}
    return {"student": student, "denoised": result.denoised, "teacher": teacher}


def _gammas(training: Training, batches: Iterable[Any], count: int) -> dict[str, Tensor]:
    """Return per pair the gammas of up to `count` images; empty if no method has a gamma."""
    found: dict[str, list[Tensor]] = {}
    images = 0
    torch.manual_seed(0)
    for batch in batches:
        given, seen = _observe(training, batch)
        for name, (_, _, result) in seen.items():
            if getattr(result, "gamma", None) is not None:
                found.setdefault(name, []).append(result.gamma.float().cpu())
        images += len(given)
        if images >= count or not found:
            break
    return {name: torch.cat(values) for name, values in found.items()}
