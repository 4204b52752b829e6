"""The card of a saved student: all that is needed to build, feed and judge it again."""

from collections.abc import Mapping
from typing import Any

import lightning
import torch

from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.history import Row, measurements


def make_card(model: str, data: DataFacts, config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a student, before anything is known of how well it does.

    Args:
        model: its name, as for :func:`~diffkd.models.load_model`.
        data: the facts of what it is trained and measured on.
        config: the run's values.

    Returns:
        A mapping that JSON can hold.
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
    """Return the card of the weights of one epoch: its number, its metrics, and whether it was the last or the best.

    Weights of mid-epoch have no row, and `which` names their step.
    """
    return {
        **card,
        "metrics": {} if row is None else measurements(row),
        "epoch": None if row is None else int(row["epoch"]),
        "which": which,
    }


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    from diffkd import __version__

    return {"diffkd": __version__, "torch": str(torch.__version__), "lightning": str(lightning.__version__)}
