"""The task of the data, and loading of models for it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.models import load_backbone, load_detector, load_model, load_segmenter
from diffkd.models.segmenters.any_size import stride_of
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.options import DEFAULT_DETECTION, DEFAULT_SEGMENTATION, DetectionOptions, SegmentationOptions
from diffkd.tasks.task import Task


def build_task(
    data: DataFacts,
    *,
    label_smoothing: float = 0.0,
    segmentation: SegmentationOptions = DEFAULT_SEGMENTATION,
    models: Sequence[nn.Module] = (),
    teachers: Sequence[Callable[[Any], Tensor]] = (),
) -> Task:
    """Build the task of the data.

    Args:
        data: the facts of the data.
        label_smoothing: for classification, share of the label that is spread over all classes.
        segmentation: for segmentation.
        models: the models whose stride determines the padding of images.
        teachers: for representations, functions from the student's images to each teacher's embedding.

    Raises:
        ValueError: if an option does not fit the task.
    """
    if data.task != "classification" and label_smoothing:
        raise ValueError(f"label_smoothing is for classification, the data are for {data.task}; leave it out")
    if data.task != "segmentation" and segmentation != DEFAULT_SEGMENTATION:
        raise ValueError(f"options of segmentation were given, but the data are for {data.task}; leave them out")
    # Imported here, since torchmetrics takes seconds to import.
    match data.task:
        case "classification":
            from diffkd.tasks.classification import Classification

            values = data.num_classes, label_smoothing, data.mixup, data.cutmix, data.classes
            return Classification(*values, multi_label=data.multi_label)
        case "segmentation":
            from diffkd.tasks.segmentation import Segmentation

            multiple = math.lcm(*(stride_of(model) for model in models))
            return Segmentation(data.classes, data.ignore_index, multiple, segmentation)
        case "detection":
            from diffkd.tasks.detection import Detection

            return Detection(data.classes)
        case "representation":
            from diffkd.tasks.representation import Representation

            return Representation(data.probe, teachers, mixup=data.mixup, cutmix=data.cutmix)


def load(
    name: str,
    data: DataFacts,
    *,
    num_classes: int | None,
    in_channels: int | None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    auxiliary: bool = False,
    detection: DetectionOptions = DEFAULT_DETECTION,
    weights_key: str | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Build a model by name for the task of the data.

    Args:
        name: as for :func:`~diffkd.models.load_model`, :func:`~diffkd.models.segmenters.load` or
            :func:`~diffkd.models.detectors.load`.
        data: gives the task, and normalisation and size of a detector's images.
        num_classes: number of classes; None, for classifiers only: the model's own.
        in_channels: channels of the images; None, for classifiers only: the model's own.
        weights: file to load strictly.
        pretrained: load the published weights.
        pretrained_backbone: load the published weights of the backbone alone; not for classifiers, which have none.
        auxiliary: build a segmenter with an auxiliary head.
        detection: how detectors are built.
        weights_key: prefix of the weights' names, if the file holds several sets that fit.
        new_head: initialise layers that depend on `num_classes` randomly if the file has none or others.

    Raises:
        ValueError: if the model is unknown, or an option does not fit the task.
    """
    classes = data.num_classes if num_classes is None else num_classes
    if data.task != "detection" and detection != DEFAULT_DETECTION:
        raise ValueError(f"options of detection were given, but the data are for {data.task}; leave them out")
    match data.task:
        case "classification":
            _refuse_backbone(pretrained_backbone)
            return load_model(
                name,
                num_classes=num_classes,
                in_channels=in_channels,
                weights=weights,
                pretrained=pretrained,
                weights_key=weights_key,
                new_head=new_head,
            )
        case "segmentation":
            return load_segmenter(
                name,
                num_classes=classes,
                in_channels=data.in_channels if in_channels is None else in_channels,
                pretrained_backbone=pretrained_backbone,
                auxiliary=auxiliary,
                weights=weights,
                pretrained=pretrained,
                weights_key=weights_key,
                new_head=new_head,
            )
        case "detection":
            return load_detector(
                name,
                num_classes=classes,
                min_size=data.min_size,
                max_size=data.max_size,
                **asdict(detection),
                pretrained_backbone=pretrained_backbone,
                weights=weights,
                pretrained=pretrained,
                weights_key=weights_key,
                new_head=new_head,
            )
        case "representation":
            _refuse_backbone(pretrained_backbone)
            return load_backbone(
                name, in_channels=in_channels, weights=weights, pretrained=pretrained, weights_key=weights_key
            )


def _refuse_backbone(pretrained_backbone: bool) -> None:
    if pretrained_backbone:
        raise ValueError("pretrained_backbone is for detectors and segmenters; give pretrained for other models")


def load_saved(name: str, data: DataFacts, weights: str | Path, card: Mapping[str, Any]) -> nn.Module:
    """Build a model for the task and classes of the data with the options in its card, and load its weights.

    Args:
        name: as for :func:`load`.
        data: gives task, classes, channels, and normalisation and size of a detector's images.
        weights: file to load strictly.
        card: gives the options of a detector, and whether a segmenter has an auxiliary head.

    Raises:
        ValueError: if the model is unknown, or the weights do not fit it.
    """
    return load(
        name,
        data,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        weights=weights,
        auxiliary=bool((card.get("segmentation") or {}).get("auxiliary")),
        detection=DetectionOptions(**(card.get("detection") or {})),
    )


def padded_example(data: DataFacts, *models: nn.Module) -> Any:
    """Return the example of the data, padded to a size that segmenters accept."""
    if data.task != "segmentation":
        return data.example
    multiple = math.lcm(*(stride_of(model) for model in models))
    height, width = data.example.shape[2:]
    return F.pad(data.example, (0, -width % multiple, 0, -height % multiple))
