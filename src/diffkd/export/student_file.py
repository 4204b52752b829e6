"""Files of a student and its card: all that is needed to rebuild it, preprocess its input and evaluate it."""

from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from diffkd.files.history import Row, measurements
from diffkd.files.run_folder import RunFolder
from diffkd.files.values import read_json_file
from diffkd.files.weights import WHOLE_FILES
from diffkd.models.hub import fetch_student, is_hub
from diffkd.tasks.data_facts import DataFacts

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
    packaged = Path(str(files("diffkd"))) / "assets" / path
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
        ValueError: if the card is damaged.
    """
    path = card_file(weights)
    if not path.is_file() or path == Path(weights):
        return {}
    card = read_json_file(path)
    if not isinstance(card, dict):
        raise ValueError(f"{path} is no card of a model; delete it, or save the model again")
    return card


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
