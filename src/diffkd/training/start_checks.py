"""Checks before the first step: classes, dtypes, methods for the task, schedules beyond the last epoch."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from diffkd.distill.balance import Balance
from diffkd.distill.distiller import Distiller
from diffkd.distill.matching import attribute_of
from diffkd.distill.ramp import Ramp
from diffkd.export.student_file import find_weights, read_card
from diffkd.features.forward import evaluation_mode, run
from diffkd.files.config import unwrap_factory
from diffkd.files.fitting import report_of
from diffkd.tasks.data_facts import DataFacts, TaskName, describe_samples, first_difference
from diffkd.tasks.task_of_data import padded_example
from diffkd.training.optimization import Schedule
from diffkd.training.options import FitOptions


def check_classes(data: DataFacts) -> None:
    """Raise ValueError if there is only one class: its probability is always 1, without gradient."""
    if data.task in ("classification", "segmentation") and data.num_classes < 2 and not data.multi_label:
        raise ValueError(
            f"the data have {data.num_classes} class ({', '.join(data.classes)}), so that there is nothing to learn: "
            "give a second one, such as the background"
        )


def check_learns(data: DataFacts, options: FitOptions) -> None:
    """Raise ValueError if data without labels come without a teacher, or with an option that needs a loss of labels."""
    if data.task != "representation":
        return
    if options.teacher is None:
        raise ValueError(
            "images without labels teach nothing by themselves: give --teacher and --method, such as diffkd.DiffKD, or "
            "data with labels"
        )
    pairs = [] if isinstance(options.pairs, str) else options.pairs
    if options.balance is not None or any(isinstance(pair.weight, Balance) for pair in pairs):
        raise ValueError(
            "a Balance follows the task's loss, which data without labels do not have: give numbers as weights, and "
            "standardize: true to the methods, so that they mean the same on every teacher"
        )


def check_type(student: nn.Module, data: DataFacts, precision: str) -> None:
    """Raise ValueError if the student's weights have another dtype than the images, and it cannot run on them.

    Args:
        student: the student.
        data: gives the example; its images are float32.
        precision: of the training; values other than "WIDTH-true" and "WIDTH-mixed" are left to the trainer.
    """
    width, _, kind = str(precision).partition("-")
    types = {p.dtype for p in student.parameters() if p.is_floating_point()} - {torch.float32}
    if not types or (kind in ("", "true") and width != "32") or kind not in ("", "true", "mixed"):
        return  # the trainer converts model and images
    lower = torch.bfloat16 if width == "bf16" else torch.float16
    try:
        with evaluation_mode(student), torch.no_grad(), torch.autocast("cpu", lower, enabled=kind == "mixed"):
            run(student, padded_example(data, student))
    except RuntimeError as error:
        names = {torch.float64: "64-true", torch.bfloat16: "bf16-true", torch.float16: "16-true"}
        mend = " or ".join(names[kind] for kind in names if kind in types) or "another"
        raise ValueError(
            f"the weights of student {type(student).__name__} are of {', '.join(sorted(map(str, types)))}, but with "
            f"--precision {precision} its images are of torch.float32: give --precision {mend}, or build it in float32"
        ) from error


def never_reached(schedule: Schedule, ramp: Ramp, epochs: int) -> list[str]:
    """Return warnings about parts of a schedule and a ramp beyond the last epoch, as in a shortened recipe."""
    found = []
    late = [mark for mark in schedule.milestones if mark >= epochs]
    if schedule.kind == "step" and late:
        found.append(f"the rate does not fall at schedule.milestones {late}: there are {epochs} epochs")
    if schedule.warmup_epochs >= epochs:
        found.append(f"the rate rises for schedule.warmup_epochs={schedule.warmup_epochs:g} epochs, of {epochs}")
    if ramp.start + ramp.warmup >= epochs:
        found.append(
            f"the method never counts in full: method_ramp.start={ramp.start:g} and method_ramp.warmup={ramp.warmup:g} "
            f"take all of the {epochs} epochs"
        )
    return found


INSTEAD: Mapping[TaskName, str] = {
    "classification": "DiffKD, FitNet, CRD or ReviewKD for features, KD, DKD or DIST for logits",
    "segmentation": "DiffKD, FitNet, CWD or CIRKD for features, DiffKD, KD or DIST for class maps",
    "detection": "DiffKD, FitNet, FGD or MGD for the feature pyramid, BoxKD for the outputs",
    "representation": "DiffKD, FitNet, Cosine, CWD, RKD, SP or PKT, which need no labels",
}
_GIVEN: Mapping[TaskName, frozenset[str]] = {
    "classification": frozenset({"labels", "indices", "teacher_head"}),
    "segmentation": frozenset({"labels", "indices"}),
    "detection": frozenset({"boxes", "indices"}),
    "representation": frozenset({"indices"}),
}


def inner_methods(method: Any) -> dict[str, Any]:
    """Return the methods among a factory's keyword arguments, by name."""
    method = unwrap_factory(method)
    keywords = method.keywords if isinstance(method, partial) else {}
    return {
        name: value
        for name, value in keywords.items()
        if callable(value) and any(attribute_of(unwrap_factory(value), word, None) for word in ("wants", "needs"))
    }


def check_methods(methods: Any, data: DataFacts) -> None:
    """Raise ValueError if a method or factory, or a method inside it, does not support the data's task."""
    for method in _all(methods):
        tasks = attribute_of(method, "tasks", None)
        if tasks is not None and data.task not in tasks:
            name = attribute_of(method, "__name__", type(method).__name__)
            raise ValueError(
                f"{name} is for {' and '.join(sorted(tasks))}, the data are for {data.task}: take {INSTEAD[data.task]}"
            )


def check_needs(distiller: Distiller, data: DataFacts) -> None:
    """Raise ValueError if the data do not meet a method's needs: arguments, unmixed images, batch size, classifier."""
    for name, (_, theirs), method in zip(distiller.names, distiller.readers, distiller.methods, strict=True):
        needs = frozenset(getattr(method, "needs", ()))
        who = f"{type(method).__name__} of pair '{name}'"
        given = _GIVEN[data.task] - ({"labels"} if data.multi_label else set())
        if data.multi_label and theirs.shapes[0].role == "logits":
            warnings.warn(
                f"{who} compares a softmax over the classes, of which an image has several here: a method on features "
                "alone, such as diffkd.FitNet or --method.features_only true, presumes no single class",
                stacklevel=2,
            )
        if missing := sorted(needs - given):
            otherwise = "; on the class map itself it may need none" if data.task == "segmentation" else ""
            raise ValueError(
                f"{who} needs {', '.join(missing)}, which data for {data.task} do not give{otherwise}: "
                f"take {INSTEAD[data.task]}"
            )
        least = max(getattr(part, "least_batch", 1) for part in method.modules())
        if data.batch_size is not None and data.batch_size < least:
            raise ValueError(
                f"{who} relates the images of a batch to one another, and learns nothing from batches of "
                f"{data.batch_size}: give --data.batch_size {least} or more"
            )
        if "labels" in needs and (data.mixup or data.cutmix):
            raise ValueError(
                f"{who} needs the class of each image, but the data mix them (mixup={data.mixup}, cutmix="
                f"{data.cutmix}): set both to 0, or take a method without labels, such as DiffKD, KD or DIST"
            )
        if "teacher_head" in needs:
            try:
                distiller.teacher_head(name)
            except ValueError as error:
                reason = str(error).partition(":")[0]
                raise ValueError(
                    f"{who} needs the teacher's classifier, but {reason}; pair what its last linear layer is given"
                ) from error


def _all(methods: Any) -> Iterator[Any]:
    for method in methods:
        if method is not None:
            yield unwrap_factory(method)
            yield from _all(inner_methods(method).values())


# Arguments that are set from the data, and the entry of `needs` that a method must have for it.
_DATA_ARGUMENTS = {"samples": "indices", "classes": "labels"}


def set_data_arguments(method: Any, data: LightningDataModule) -> Any:
    """Return a method's factory with `samples`, `classes` and `sample_labels` set from the data, if it takes them.

    `samples` (number of training images) is set if it is None and the method needs "indices", `classes` if it is None
    and the method needs "labels". `sample_labels` (class of every training image) is set if it is None, the method
    needs both, and the data hold the labels. The same holds for methods inside another, as in :class:`~diffkd.Shared`.

    Args:
        method: a factory, or a method, which is returned unchanged.
        data: the data module.

    Raises:
        ValueError: if `samples` is another number, or `classes` a smaller one, than that of the data.
    """
    if method is None or isinstance(method, nn.Module):
        return method
    method = unwrap_factory(method)
    inner = {name: set_data_arguments(one, data) for name, one in inner_methods(method).items()}
    values: dict[str, Any] = {
        name: value for name, need in _DATA_ARGUMENTS.items() if (value := _value(method, name, need, data)) is not None
    }
    kind = method.func if isinstance(method, partial) else method
    argument = inspect.signature(method).parameters.get("sample_labels")
    if argument is not None and argument.default is None and {"indices", "labels"} <= set(getattr(kind, "needs", ())):
        values["sample_labels"] = _labels_of(data)
    return partial(method, **inner, **values) if inner or values else method


def _value(method: Callable[..., Any], name: str, need: str, data: LightningDataModule) -> int | None:
    """Return the value of a method's argument `name`; None to leave it."""
    kind = method.func if isinstance(method, partial) else method
    argument = inspect.signature(method).parameters.get(name)
    needs = getattr(kind, "needs", ())
    if argument is None or isinstance(needs, property) or need not in needs:
        return None
    count = describe_samples(data.train_dataloader())["training images"] if name == "samples" else _classes(data)
    given = argument.default
    if count is None or given == count or given is inspect.Parameter.empty:
        return None
    if given is None:
        return count
    if name == "classes" and given > count:
        return None  # more classes than in the data are allowed
    what = "training images" if name == "samples" else "classes"
    raise ValueError(
        f"{kind.__name__} is told of {given} {what} by {name}, but the data have {count}: "
        f"leave --method.{name} out, or give {count}"
    )


def _labels_of(data: LightningDataModule) -> Any:
    """Return the class of every training image, (n,) int64, None if the data module does not hold them."""
    loader = data.train_dataloader()
    dataset = getattr(loader, "dataset", None)
    for holder in (loader, dataset, getattr(dataset, "samples", None)):
        for name in ("labels", "targets"):
            labels = getattr(holder, name, None)
            if labels is not None and torch.as_tensor(labels).ndim == 1:
                return torch.as_tensor(labels).cpu().long()
    return None


def _classes(data: LightningDataModule) -> int | None:
    count = getattr(data, "num_classes", None)
    return None if count is None else int(count)


def check_teacher_classes(
    distiller: Distiller, weights: str | Path, data: DataFacts, given: Sequence[str] | None = None
) -> None:
    """Compare the class names of teacher and data, if their scores are paired.

    Warns if the names differ; they may still denote the same classes.

    Args:
        distiller: with its pairs.
        weights: the teacher's; their card has its class names.
        data: the facts of the data.
        given: the user's class names, which override the card's. If they are the data's in another order, the teacher's
            scores have already been reordered.

    Raises:
        ValueError: if the names are the same in another order.
    """
    if given is not None and sorted(given) == sorted(data.classes):
        return
    theirs = given or read_card(find_weights(weights)).get("classes") or ()
    other = first_difference(theirs, data.classes)
    if len(theirs) != len(data.classes) or other is None or not _pairs_scores(distiller):
        return
    if sorted(theirs) == sorted(data.classes):
        raise ValueError(
            f"the teacher {weights} has the classes of the data in another order: {other}. Give the data that order, "
            "pair features alone, or give its names as --teacher_options.classes, by which its scores are then mapped"
        )
    warnings.warn(
        f"the teacher {weights} names its classes otherwise than the data: {other}. If they are others, or in another "
        "order, its scores teach nonsense: pair features alone then",
        stacklevel=2,
    )


def check_teacher_head(distiller: Distiller, teacher: nn.Module) -> None:
    """Raise ValueError if the teacher's scores are paired, but its file held no classifier.

    Args:
        distiller: with its pairs.
        teacher: the teacher.
    """
    report = report_of(teacher)
    if report is not None and report.random and _pairs_scores(distiller):
        raise ValueError(
            f"the teacher's file {report.path} holds no classifier ({', '.join(report.random[:3])}), so its scores "
            "are random: pair features alone, by a method such as diffkd.FitNet or --pairs, or give the whole teacher"
        )


def _pairs_scores(distiller: Distiller) -> bool:
    scores = (
        shape.role == "logits" or name.endswith("[cls_logits]")
        for _, theirs in distiller.readers
        for name, shape in zip(theirs.names, theirs.shapes, strict=True)
    )
    return any(scores)
