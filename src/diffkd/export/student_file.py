"""Files of a student and its card: all that is needed to rebuild it, preprocess its input and evaluate it."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from diffkd.files.history import Row, measurements
from diffkd.files.run_folder import RunFolder
from diffkd.files.values import read_json_file
from diffkd.files.weights import WHOLE_FILES
from diffkd.models.hub import fetch_student, is_hub
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.options import DetectionOptions, SegmentationOptions

Which = Literal["last", "best"]

PROGRAMS = (".onnx", ".pt2")
"""File name suffixes of exported programs."""


def find_student(source: str | Path, which: Which = "last") -> Path:
    """Return the file of a student.

    Args:
        source: the file itself, the folder of a run, or "hub:USER/NAME", which is fetched.
        which: for a run, the student of the last or of the best epoch.

    Raises:
        FileNotFoundError: if there is no such file, or the run has not written it yet.
        ValueError: if it is an exported program.
        OSError: if it cannot be fetched.
    """
    if is_hub(source):
        return fetch_student(str(source))
    path = Path(source)
    if path.is_dir():
        run = RunFolder(path)
        path = run.student if which == "last" else run.best
        if not path.is_file():
            hint = "it is no finished run"
            if run.checkpoint.is_file():
                hint = f"resume it first, or take out what there is: diffkd export {run.path} --out student.safetensors"
            raise FileNotFoundError(f"{run.path} holds no {path.name}: {hint}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no run and no file {path}; give a run's folder or a student's .safetensors")
    if path.suffix in PROGRAMS:
        raise ValueError(f"{path} is a program, not weights; give the run it comes from, or a student's .safetensors")
    return path


def find_weights(weights: str | Path) -> Path:
    """Return the file for `weights`: a file, a run folder (its student), a file of the package, or "hub:USER/NAME".

    For a transformers folder it is the file of the whole model, or the index of its shards.

    Raises:
        FileNotFoundError: if none of these exists.
        OSError: if it cannot be fetched.
    """
    if is_hub(weights):
        return fetch_student(str(weights))
    path = Path(weights)
    packaged = Path(str(resources.files("diffkd"))) / "assets" / path
    for candidate in (path, path / "student.safetensors", packaged, *(path / name for name in WHOLE_FILES)):
        if candidate.is_file():
            return candidate
    if (path / ".metadata").is_file():
        raise FileNotFoundError(
            f"{path} is a checkpoint of torch.distributed in several files: join them by "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt`, and give that file"
        )
    raise FileNotFoundError(f"there are no weights at {path}: give a file, or the folder of a finished run")


def card_file(student: str | Path) -> Path:
    """Return the path of the card of a file: `a.json` for weights `a.safetensors`, `a.onnx.json` for a program.

    Weights and programs of one student may be in one folder but differ in epoch or normalisation.
    """
    path = Path(student)
    return path.with_name(f"{path.name}.json") if path.suffix in (*PROGRAMS, ".xml") else path.with_suffix(".json")


def read_card(weights: str | Path) -> dict[str, Any]:
    """Return the JSON card beside a student's file, {} if there is none.

    Raises:
        ValueError: if the card is damaged, or a value is not of the kind that is meant there.
    """
    path = card_file(weights)
    if not path.is_file() or path == Path(weights):
        return {}
    return check_card(read_json_file(path), path)


def check_card(card: Any, source: Path) -> dict[str, Any]:
    """Return a card whose values can be relied on to be of their kinds, where they are there at all.

    What another program wrote under the name of a card, such as its own settings, has other values under these names;
    those are left out with a warning. So is what only says how to measure again, also in a card. A mean above 1, in a
    card that does not say whether it is one of scaled pixels, is taken as one of pixels from 0 to 255, with a warning.

    Args:
        card: what a file holds.
        source: that file, for messages.

    Raises:
        ValueError: if it is no mapping, or a value of a card is of another kind; names file, value and kind.
    """
    if not isinstance(card, dict):
        raise ValueError(f"{source} is no card of a model; delete it, or save the model again")
    found = dict(card)
    # What a card written by hand may say more shortly: one side of a square, and classes by their numbers.
    if type(side := found.get("image_size")) is int:
        found["image_size"] = [side, side]
    if isinstance(names := found.get("classes"), list):
        found["classes"] = [str(name) if type(name) is int else name for name in names]
    others = [name for name, (_, is_one) in _KINDS.items() if found.get(name) is not None and not is_one(found[name])]
    is_card = isinstance(found.get("model"), str) and "num_classes" in found
    if wrong := [name for name in others if is_card and name not in ("data", "metrics")]:
        raise ValueError(
            f"{source}: its {wrong[0]} is {found[wrong[0]]!r:.80}, and no {_KINDS[wrong[0]][0]}: correct it, or "
            "save the model again"
        )
    if others:
        rank_zero_warn(f"{source}: left out, as a card of a model has other values there: {', '.join(others)}")
    kept = {name: value for name, value in found.items() if name not in others}
    return kept if kept.get("scaled") is not None else _scaled(kept, source)


def _scaled(card: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return a card that says whether mean and std are those of pixels in [0, 1], if they are not."""
    means, deviations = card.get("mean") or (), card.get("std") or ()
    if max(means, default=0.0) <= 1:
        return card
    if max(means) > _WHITE:
        return card | {"scaled": False}
    rank_zero_warn(
        f"{source}: its mean {means} is not of pixels in [0, 1]; mean and std are taken as of pixels in [0, 255], and "
        'divided by 255. Write "scaled": false into the card if it was of other floats, or the divided ones'
    )
    return (
        card
        | {"scaled": True}
        | {name: [one / _WHITE for one in values] for name, values in (("mean", means), ("std", deviations))}
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_CLASSES  # images without labels have no classes


def _are_numbers(value: Any, least: float = -math.inf) -> bool:
    numbers = isinstance(value, list) and value and all(type(one) in (int, float) for one in value)
    return bool(numbers) and all(least < one < math.inf for one in value)


def _are_options(value: Any, of: Any) -> bool:
    return isinstance(value, dict) and set(value) <= {field.name for field in fields(of)}


def _is_data(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("class_path", ""), str)
        and isinstance(value.get("init_args") or {}, dict)
    )


_WHITE = 255
_MOST_CLASSES = 1_000_000
# What the values of a card are, those that are read again, and how it is told.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("task", "model"), ("name", lambda value: isinstance(value, str))),
    **dict.fromkeys(("num_classes", "in_channels"), (f"whole number up to {_MOST_CLASSES:,}", _is_count)),
    "image_size": ("list of height and width in pixels", lambda value: isinstance(value, list)),
    "mean": ("list of numbers", _are_numbers),
    "std": ("list of numbers above 0", functools.partial(_are_numbers, least=0.0)),
    "classes": ("list of names", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value)),
    **dict.fromkeys(("multi_label", "scaled"), ("true or false", lambda value: isinstance(value, bool))),
    "data": ("class_path with init_args", _is_data),
    "detection": ("mapping of a detector's options", functools.partial(_are_options, of=DetectionOptions)),
    "segmentation": ("mapping of a segmenter's options", functools.partial(_are_options, of=SegmentationOptions)),
    "metrics": ("mapping of measurements", lambda value: isinstance(value, dict)),
}


def make_card(model: str, data: DataFacts, config: Mapping[str, Any]) -> dict[str, Any]:
    """Make the card of a student, without metrics.

    Args:
        model: name of the model, as for :func:`~diffkd.models.load_model`.
        data: the facts of the data it is trained and evaluated on.
        config: the run's values.

    Returns:
        A JSON-serialisable mapping.
    """
    return {
        "task": data.task,
        "model": model,
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "image_size": list(data.image_size),
        "mean": list(data.mean),
        "std": list(data.std),
        "scaled": data.pixel_unit is not None,
        "classes": list(data.classes),
        "multi_label": data.multi_label or None,
        "data": config.get("data"),
        "detection": config.get("detection") if data.task == "detection" else None,
        "segmentation": config.get("segmentation") if data.task == "segmentation" else None,
        "channels_last": config.get("channels_last"),
        "precision": config.get("precision", "32-true"),
        "teacher": config.get("teacher"),
        "method": config.get("method"),
        "seed": config.get("seed"),
        "averaged": config.get("ema"),
        "versions": versions(),
    }


def with_metrics(card: Mapping[str, Any], row: Row | None, which: str) -> dict[str, Any]:
    """Add to a card the number and metrics of an epoch, and whether it was the last or the best.

    Weights from mid-epoch have no row; `which` then names their step.
    """
    return {
        **card,
        "metrics": {} if row is None else measurements(row),
        "epoch": None if row is None else int(row["epoch"]),
        "which": which,
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    from diffkd import __version__

    return {"diffkd": __version__, "torch": str(torch.__version__), "lightning": version("lightning")}
