"""`diffkd test`: evaluate a saved student exactly as at the end of its training."""

import importlib
import inspect
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, Trainer
from rich.console import Console
from torch import nn

from diffkd.data.image_data import allow_missing_training_images
from diffkd.data.segmentation.mask_folder import split_folder
from diffkd.data.splits import choose_split
from diffkd.export.plain_student import named_model
from diffkd.export.student_file import PROGRAMS, Which, find_student, read_card
from diffkd.inference.students import load_program
from diffkd.recipes.trust import Trust, trust_words
from diffkd.tasks.data_facts import DataFacts, check_unit, facts_of, first_difference
from diffkd.tasks.options import SegmentationOptions
from diffkd.tasks.task_of_data import build_task, load_saved
from diffkd.teacher.view import TeacherInput
from diffkd.training.callbacks import silence_lightning
from diffkd.training.lightning_module import Training
from diffkd.training.models import use_channels_last
from diffkd.training.options import DEFAULT_OPTIMIZER, DEFAULT_SCHEDULE


def evaluate(
    student: str,
    *,
    model: str | None = None,
    data: LightningDataModule | None = None,
    which: Which = "last",
    split: Literal["test", "val"] | None = None,
    segmentation: SegmentationOptions | None = None,
    precision: str | None = None,
    accelerator: str = "auto",
    progress: bool = True,
    trust: list[str] | None = None,
) -> dict[str, float]:
    """Evaluate a student on the test split of its data, or on the evaluation split if there is no test split.

    Training images are not needed; evaluation images may be of some of the student's classes only.

    Arguments that are not given are read from the card beside the weights. A card may name models of the known
    libraries and data of this package; other code runs only if it is named or trusted on this call.

    Args:
        student: folder of a run, file of weights, or an exported .onnx or .pt2. Load a .pt2, which is a program, only
            if you trust it.
        model: name of the model, as for fit.
        data: data to evaluate on; on the command line, `--data.NAME VALUE` without `--data` changes one value of the
            card's data.
        which: for a run, the student of the last or of the best epoch.
        split: test or val; None: test if it exists. Measurements recorded in training are of val.
        segmentation: as for fit, such as the windows of the evaluation; None: as in training.
        precision: as for fit; None: as in training.
        accelerator: cpu, gpu, mps, or auto.
        progress: print the measurements.
        trust: files and modules of your own whose code the card may name; may be repeated.

    Returns:
        The measurements by name, in [0, 1] except "loss": for classification "top1", with more than five classes
        "top5", and "loss", the mean cross entropy.

    Raises:
        FileNotFoundError: if there are no such weights, or the data are not found.
        ValueError: if the weights do not fit the model, the data have their classes in another order, or a required
            value is given neither by the arguments nor by the card.
    """
    program = load_program(Path(student)) if Path(student).suffix in PROGRAMS else None
    path = find_student(student, which) if program is None else program.path
    card = read_card(path) if program is None else dict(program.card)
    if path.suffix == ".ckpt" and (model is None or data is None):
        raise ValueError(
            f"{path} holds a whole training: take the student out of it with `diffkd export {path} --out "
            "student.safetensors`, and test that"
        )
    if data is None:
        with allow_missing_training_images(card.get("classes") or ()):
            data = data_of(card, trust or ())
            if split != "val":
                data = _with_test_masks(card, data)
    facts = facts_of(data)
    name = str(card.get("model")) if program is not None else model or named_model(card, path, trust or ())
    classes, channels = card.get("num_classes", facts.num_classes), card.get("in_channels", facts.in_channels)
    if (classes, channels) != (facts.num_classes, facts.in_channels):
        raise ValueError(
            f"{path} is for {classes} classes and {channels} channels, the data have {facts.num_classes} and "
            f"{facts.in_channels}; give the data it was trained on with --data"
        )
    if card.get("task", facts.task) != facts.task:
        raise ValueError(f"{path} is for {card['task']}, the data are for {facts.task}; give other --data")
    _check_names(path, card.get("classes") or facts.classes, facts.classes)
    if facts.task == "representation" and not facts.probe:
        raise ValueError(
            f"{path} is a representation, which labelled images measure, and the data have none: give --data.probe "
            "FOLDER"
        )
    check_unit(card.get("scaled"), facts, str(path))
    options = SegmentationOptions(**_pairs_as_tuples(card.get("segmentation") or {}))
    if program is None:
        built = load_saved(name, facts, path, card)
        use_channels_last(built, facts, card.get("channels_last"), accelerator)
        normalization = tuple(card.get("mean", facts.mean)), tuple(card.get("std", facts.std))
        size = f"{sum(p.numel() for p in built.parameters()):,} parameters"
    else:
        built, normalization = program.module, (program.mean, program.std)
        size = f"{path.stat().st_size / 2**20:.2f} MiB in {program.runtime}"
    training = Training(
        _renormalised(built, normalization, facts),
        build_task(facts, segmentation=options if segmentation is None else segmentation),
        optimizer=DEFAULT_OPTIMIZER,
        schedule=DEFAULT_SCHEDULE,
        epochs=1,
    )
    with silence_lightning():
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision or ("32-true" if program is not None else card.get("precision", "32-true")),  # type: ignore[arg-type]  # checked by the trainer
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        name_of_split, loader = choose_split(data, split)
        loaders: list[Any] = []

        def kept_loader() -> Any:
            loaders.append(loader())
            return loaders[-1]

        setattr(data, "val_dataloader", kept_loader)  # noqa: B010, as no method can be assigned to
        trainer.validate(training, datamodule=data, verbose=False)
    measured = training.measured
    console = Console(quiet=not progress)
    console.print(
        f"{path}: {name}, {size}, measured on {name_of_split}{_count(loaders)}",
        highlight=False,
        soft_wrap=True,
    )
    of_val = "" if name_of_split != "test" or split == "val" else " on the evaluation images"
    width = max(map(len, measured))
    for metric, value in measured.items():
        recorded = card.get("metrics", {}).get(metric)
        note = (
            ""
            if recorded is None
            else f"  (recorded {_format_metric(metric, recorded)}{of_val}, {card.get('which', '')})"
        )
        console.print(f"{metric:{width}}  {_format_metric(metric, value)}{note}", highlight=False, soft_wrap=True)
    return measured


def classes_of(student: str) -> tuple[str, ...]:
    """Return the names of a saved student's classes, () if there is no such student or it does not say."""
    with suppress(OSError, ValueError):
        return tuple(map(str, read_card(find_student(student)).get("classes") or ()))
    return ()


def _count(loaders: Sequence[Any]) -> str:
    """Return ", 1,000 images" for loaders of which the first knows the number of its samples."""
    with suppress(IndexError, AttributeError, TypeError):
        count = len(loaders[0].sampler)
        return f", {count:,} image{'s' if count != 1 else ''}"
    return ""


def _check_names(path: Path, learned: Sequence[str], given: Sequence[str]) -> None:
    other = first_difference(learned, given)
    if other is not None and sorted(learned) == sorted(given):
        raise ValueError(f"{path} has the classes of the data in another order: {other}. Give the data that order")
    if other is not None:
        warnings.warn(
            f"{path} names its classes otherwise than the data: {other}. If they are others, or in another order, what "
            "is measured says nothing",
            stacklevel=3,
        )


def _pairs_as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _format_metric(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric == "loss" else f"{100 * value:.2f} %"


def data_of(card: dict[str, Any], trust: Sequence[str] = ()) -> LightningDataModule:
    """Build the data module named in a card, if it is of this package or of trusted code."""
    kind, arguments = described_data(card, trust)
    parameters = inspect.signature(kind).parameters
    if isinstance(arguments.get("augmentation"), dict):
        # Each data module has its own class of augmentation options, the type of the default.
        described = parameters["augmentation"].default
        arguments["augmentation"] = type(described)(**_pairs_as_tuples(arguments["augmentation"]))
    try:
        return kind(**arguments)
    except TypeError as error:
        name = f"{kind.__module__}.{kind.__name__}"
        raise ValueError(f"the data cannot be made from the card ({error}); give --data {name} ...") from error


def _with_test_masks(card: dict[str, Any], data: LightningDataModule) -> LightningDataModule:
    """Rebuild a `MaskFolder` with the test split as its evaluation split, if there are test images with masks."""
    if type(data).__name__ != "MaskFolder":
        return data
    folders: Any = data
    root, places = Path(folders.root), (folders.images, folders.masks)
    if folders.val == "test" and folders.val_share is None:
        return data
    if not all(_holds_files(root / split_folder(place, "test")) for place in places):
        return data
    arguments = (card.get("data") or {}).get("init_args") or {}
    described = {"class_path": "diffkd.data.MaskFolder", "init_args": {**arguments, "val": "test", "val_share": None}}
    return data_of({**card, "data": described})


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_file() and not path.name.startswith(".") for path in folder.rglob("*"))


def described_data(card: dict[str, Any], trust: Sequence[str] = ()) -> tuple[type[LightningDataModule], dict[str, Any]]:
    """Return the class of the data module named in a card, and its arguments as stored in the card.

    Args:
        card: the card of a student.
        trust: files and modules whose code the card may name.

    Raises:
        ValueError: if the card names no data module, or one that is neither of this package nor trusted.
    """
    description = card.get("data") or {}
    module, _, name = str(description.get("class_path", "")).rpartition(".")
    if not module:
        raise ValueError("nothing says what to measure on; give --data, such as diffkd.data.FashionMNIST")
    ours = module == "diffkd.data" or module.startswith("diffkd.data.") or Trust(trust).includes(module)
    home = module if Trust(trust).includes(module) else "diffkd.data"
    kind = getattr(importlib.import_module(home), name, None)
    if not ours or not isinstance(kind, type) or not issubclass(kind, LightningDataModule):
        raise ValueError(
            f"the card names data of somebody's own, {module}.{name}; give --data {module}.{name} yourself, or"
            f"{trust_words([module])}"
        )
    arguments = dict(description.get("init_args") or {})
    if "seed" in inspect.signature(kind).parameters and card.get("seed") is not None:
        # The command line passes the run's seed to the data; generated scenes depend on it.
        arguments.setdefault("seed", card["seed"])
    return kind, arguments


def _renormalised(
    model: nn.Module, normalization: tuple[tuple[float, ...], tuple[float, ...]], facts: DataFacts
) -> nn.Module:
    """Wrap the model so that its input has its mean and standard deviation, whatever the data's normalisation."""
    mean, std = normalization
    if facts.task == "detection" or (mean, std) == (facts.mean, facts.std):
        return model
    return nn.Sequential(TeacherInput(facts.mean, facts.std, mean, std), model)
