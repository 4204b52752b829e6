"""Options of a task that the data are not for."""

from typing import Any

import pytest
import torch

from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.options import DetectionOptions, SegmentationOptions
from diffkd.tasks.task_of_data import build_task
from diffkd.training.models import build_student

FACTS = DataFacts(5, 3, (32, 32), (0.5,) * 3, (0.25,) * 3, tuple("abcde"), torch.zeros(2, 3, 32, 32))


def test_options_of_segmentation_are_refused_for_another_task() -> None:
    with pytest.raises(ValueError, match="options of segmentation were given, but the data are for classification"):
        build_task(FACTS, segmentation=SegmentationOptions(window=(8, 8)))


def test_options_of_detection_are_refused_for_another_task() -> None:
    values: dict[str, Any] = {"weights": None, "pretrained": False, "seed": 0}
    with pytest.raises(ValueError, match="options of detection were given, but the data are for classification"):
        build_student("cifar/compact_resnet8", FACTS, detection=DetectionOptions(norm="group"), **values)
    build_student("cifar/compact_resnet8", FACTS, detection=DetectionOptions(), **values)
