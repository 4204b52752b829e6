"""Small detectors, scenes for them, and whole trainings of them in seconds."""

import functools
from pathlib import Path
from typing import Any

import torch
from short_trainings import Tripwire
from torch import nn

from diffkd.data import DetectionScenes
from diffkd.files.config import describe
from diffkd.files.weights import save_student
from diffkd.models import load_detector
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.options import DetectionOptions
from diffkd.training.fit import fit

CLASSES = ("Bag", "Trouser")
TINY = DetectionOptions(fpn_channels=32, norm="group", anchor_scale=0.1)
NAME = "retinanet/timm/test_resnet"


def detector(
    family: str = "retinanet", *, seed: int = 0, num_classes: int = 2, min_size: tuple[int, ...] = (64,), **options: Any
) -> nn.Module:
    """An untrained detector for images of about 64 pixels."""
    torch.manual_seed(seed)
    options = {"fpn_channels": 64 if family == "fcos" else 32, "anchor_scale": 0.1} | options
    name = f"{family}/timm/test_resnet"
    model = load_detector(name, num_classes=num_classes, min_size=min_size, max_size=128, **options)
    if family == "fasterrcnn":  # a tenth of the usual proposals, which take their time
        model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"training": 40, "testing": 40}
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 16
    return model


def batch(*counts: int, seed: int = 0) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images of different sizes with so many boxes each."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for index, count in enumerate(counts):
        height, width = 64 + 8 * index, 80 - 8 * index
        corners = torch.rand(count, 2, generator=generator) * torch.tensor([width / 2, height / 2])
        sizes = 8 + torch.rand(count, 2, generator=generator) * 20
        images.append(torch.rand(3, height, width, generator=generator))
        labels = torch.arange(count) % 2 + 1
        targets.append({"boxes": torch.cat([corners, corners + sizes], 1), "labels": labels})
    return images, targets


def facts(num_classes: int = 2, min_size: tuple[int, ...] = (64,)) -> DataFacts:
    """The facts of data with two classes."""
    return DataFacts(
        num_classes=num_classes,
        in_channels=3,
        image_size=(64, 64),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        classes=tuple(f"class {index}" for index in range(num_classes)),
        example=[torch.rand(3, 64, 80), torch.rand(3, 72, 72)],
        task="detection",
        min_size=min_size,
        max_size=128,
    )


class Tripping(DetectionScenes):
    """Scenes that call something just before the given batch of the training is handed out."""

    trip = -1
    action: Any = None

    def train_dataloader(self) -> Any:
        return Tripwire(super().train_dataloader(), self.trip, self.action)


def scenes(trip: int = -1, action: Any = None, **options: Any) -> DetectionScenes:
    """Seven training scenes in batches of two, and four for the evaluation."""
    options = {"train_count": 7, "val_count": 4, "size": (64, 64), "batch_size": 2, "classes": CLASSES} | options
    data = Tripping(**options)
    data.trip, data.action = trip, action
    return data


def teacher_file(folder: Path) -> Path:
    """Weights of an untrained teacher, without a card."""
    path = folder / "teacher.safetensors"
    save_student(detector(seed=9, norm="group"), path)
    return path


def train(data: DetectionScenes, out: Path, **options: Any) -> dict[str, Any]:
    """Train a small detector for two epochs, and distil into it if `method` is given."""
    weights = options.pop("weights", None)
    taught = {"teacher": NAME, "teacher_weights": str(weights)} if options.get("method") else {}
    defaults = {
        "epochs": 2,
        "progress": False,
        "accelerator": "cpu",
        "detection": TINY,
        "gradient_clip": 1.0,
        "optimizer": functools.partial(torch.optim.SGD, lr=0.005, momentum=0.9),
        "log_every": 2,
        "config": {"detection": describe(TINY)},
    }
    return fit(NAME, data, out, **(defaults | taught | options))
