"""The trainings of the campaign: one of each task, of seconds, and what is left of them on the disk."""

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from small_detectors import teacher_file

from diffkd.files.weights import read_weights
from diffkd.training.checkpointing import read_checkpoint

TESTS = Path(__file__).parents[1]
CLASSIFIERS, SEGMENTERS = TESTS / "tiny_models.py", TESTS / "tiny_segmenters.py"
TASKS = ("classification", "detection", "segmentation")


@dataclass
class Recipe:
    """A recipe file and the words that run it.

    Args:
        file: the recipe.
        words: further words of `diffkd fit`.
        every: steps between two checkpoints.
        steps: steps of the whole run.
    """

    file: Path
    words: list[str]
    every: int
    steps: int

    def fit(self, out: Path, *more: str) -> list[str]:
        """Return the command that begins the run in a folder, or goes on with it."""
        return ["fit", str(self.file), *self.words, f"--out={out}", "--resume", *more]


def write_recipe(task: str, folder: Path) -> Recipe:
    """Write the recipe of a task, with its data, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write = {"classification": _classification, "detection": _detection, "segmentation": _segmentation}[task]
    values, words, steps = write(folder)
    every = 2
    values |= {"method": "diffkd.DiffKD", "save_every_steps": every, "progress": False, "accelerator": "cpu"}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    words += ["--optimizer=campaign.child.CountedSGD", "--optimizer.lr=0.01", "--optimizer.momentum=0.9"]
    return Recipe(file, words, every, steps)


def _classification(folder: Path) -> tuple[dict[str, Any], list[str], int]:
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        images = draw.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
        np.savez(folder / f"{split}.npz", images=images, labels=np.arange(50) % 4)
    options = {"train": str(folder / "train.npz"), "test": str(folder / "test.npz"), "batch_size": 10}
    values = {
        "student": f"{CLASSIFIERS}:small",
        "teacher": f"{CLASSIFIERS}:large",
        "data": {"class_path": "diffkd.data.Arrays", "init_args": options},
        "epochs": 3,
        "ema": 0.9,
    }
    return values, [f"--trust={CLASSIFIERS}"], 15


def _detection(folder: Path) -> tuple[dict[str, Any], list[str], int]:
    name = "retinanet/timm/test_resnet"
    options = {"train_count": 7, "val_count": 4, "size": [64, 64], "batch_size": 2, "classes": ["Bag", "Trouser"]}
    values = {
        "student": name,
        "teacher": name,
        "teacher_weights": str(teacher_file(folder)),
        "data": {"class_path": "diffkd.data.DetectionScenes", "init_args": options},
        "detection": {"fpn_channels": 32, "norm": "group", "anchor_scale": 0.1},
        "gradient_clip": 1.0,
        "epochs": 2,
    }
    return values, [], 8


def _segmentation(folder: Path) -> tuple[dict[str, Any], list[str], int]:
    options = {"train_count": 10, "val_count": 5, "size": [40, 48], "classes": ["Bag", "Dress"], "batch_size": 4}
    values = {
        "student": f"{SEGMENTERS}:small",
        "teacher": f"{SEGMENTERS}:large",
        "data": {"class_path": "diffkd.data.SegmentationScenes", "init_args": options},
        "epochs": 3,
    }
    return values, [f"--trust={SEGMENTERS}"], 9


def whole_files(folder: Path) -> dict[str, int]:
    """Read every file of a run, and return their bytes by name; any that is not whole raises.

    Files whose names begin with a dot are being written; TensorBoard's log may end within a record.
    """
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith(".") or "tensorboard" in path.parts:
            continue
        match path.suffix:
            case ".safetensors":
                assert read_weights(path), path
            case ".ckpt":
                assert read_checkpoint(path), path
            case ".json":
                json.loads(path.read_text(encoding="utf-8"))
            case ".yaml":
                assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
            case ".csv":
                with path.open(encoding="utf-8", newline="") as file:
                    rows = list(csv.reader(file))
                assert rows and len({len(row) for row in rows}) == 1, path  # noqa: PT018
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    return sizes


def saved_step(folder: Path) -> int:
    """Return the step of a run's checkpoint, 0 without one."""
    path = folder / "checkpoints" / "last.ckpt"
    return int(read_checkpoint(path)["global_step"]) if path.is_file() else 0


def partial_files(folder: Path) -> list[str]:
    """Return the files that were being written when a run ended, and lock files."""
    return sorted(path.name for path in folder.rglob(".*") if path.is_file())


def same_runs(one: Path, other: Path) -> None:
    """Assert that two finished runs are bit-identical, except for the times."""
    same_students(one, other)
    same_students(one, other, "best.safetensors")
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (one, other)]
    for result in results:
        result["last"]["seconds"] = result["best"]["seconds"] = 0
    assert results[0]["last"] == results[1]["last"]
    assert results[0]["best"] == results[1]["best"]


def same_students(one: Path, other: Path, name: str = "student.safetensors") -> None:
    """Assert that the students and the histories of two runs are bit-identical."""
    first, second = read_weights(one / name), read_weights(other / name)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), (name, key)
    assert _table(one / "metrics.csv") == _table(other / "metrics.csv")


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def count(variable: str, usual: int) -> int:
    """Return a number of trials, from the environment."""
    return int(os.environ.get(variable, usual))
