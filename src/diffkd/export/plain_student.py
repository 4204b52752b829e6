"""A saved student as an exportable module: images in, tensors of logits or detections out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from diffkd.distill.stages import read_embedding
from diffkd.features.layers import list_layers
from diffkd.models.detectors.from_transformers import TransformersDetector
from diffkd.models.detectors.load import IMAGENET_MEAN, IMAGENET_STD
from diffkd.models.detectors.onnx_graph import DetectorGraph, QueryDetectorGraph
from diffkd.models.segmenters.any_size import AnySize
from diffkd.recipes.trust import Trust, code_of_model, trust_words
from diffkd.tasks.classification import logits_of
from diffkd.tasks.data_facts import DataFacts, TaskName
from diffkd.tasks.task_of_data import load_saved
from diffkd.teacher.view import TeacherInput


@dataclass(frozen=True)
class PlainStudent:
    """A student that `torch.export` can trace.

    Args:
        module: maps images (B, C, H, W) to the tensors named by `outputs`; in evaluation mode.
        original: the reference for its outputs: the same module, or torchvision's own code for detectors.
        outputs: names of the returned tensors.
        example: images for tracing.
        dynamic: sets of dynamic axes of the images, tried in this order.
        limit: for a detector, the largest number of detections.
    """

    module: nn.Module
    original: nn.Module
    outputs: tuple[str, ...]
    example: Tensor
    dynamic: tuple[tuple[str, ...], ...]
    limit: int = field(default=0)


def rebuild(
    weights: str | Path,
    card: Mapping[str, Any],
    *,
    model: str | None = None,
    image_size: Sequence[int] | None = None,
    normalize: bool = False,
    trust: Sequence[str] = (),
) -> PlainStudent:
    """Build a student from its weights and its card.

    Args:
        weights: file of weights, loaded strictly.
        card: the card with task, model, classes and image size.
        model: name of the model, which may be your own code; None: the card's, which must be trusted if it is your own
            code.
        image_size: (H, W), or one side of a square, of the images for tracing; None: the card's.
        normalize: include the normalisation, so that the input is images in [0, 1]. Detectors always do.
        trust: files and modules whose code the card may name.

    Returns:
        The student on the CPU, in evaluation mode.

    Raises:
        ValueError: if the card lacks a value, names untrusted code, or the weights do not fit.
    """
    name = model or named_model(card, weights, trust)
    facts = facts_of_card(card, weights, image_size)
    if normalize and facts.task != "detection":
        _card_value(card, "mean"), _card_value(card, "std")
        if facts.pixel_unit is None:
            raise ValueError(
                f"{weights} was trained on floats that are no pixels in [0, 1] or [0, 255], so that no image in [0, 1] "
                "can be normalised for it: leave --normalize out"
            )
    return plain_student(load_saved(name, facts, weights, card), facts, normalize=normalize)


def plain_student(built: nn.Module, facts: DataFacts, *, normalize: bool = False) -> PlainStudent:
    """Return a model for the task of the data as an exportable module.

    Args:
        built: the model on the CPU; it is set to evaluation mode.
        facts: of its data; gives task, channels, image size and normalisation.
        normalize: include the normalisation, so that the input is images in [0, 1]. Detectors always do.

    Raises:
        ValueError: if it is a detector that cannot be exported.
    """
    built.eval()
    size = (facts.in_channels, *facts.image_size)
    # From a generator with a fixed seed, so that an export can be repeated.
    draw = torch.Generator().manual_seed(0)
    if isinstance(built, TransformersDetector):
        queries = QueryDetectorGraph(built, (size[1], size[2])).eval()
        example = torch.rand(2, *size, generator=draw)
        found = queries(example[:1])[1].shape[1]
        return PlainStudent(queries, _EachImage(built), _FOUND, example, (("batch",), ()), found)
    if facts.task == "detection":
        graph = DetectorGraph(built).eval()
        example = torch.rand(1, *size, generator=draw)
        return PlainStudent(graph, _EachImage(built), _FOUND, example, ((),), graph.limit)
    if facts.task == "representation":
        plain: nn.Module = _Embedding(built, torch.zeros(2, *size))
    else:
        plain = AnySize(built) if facts.task == "segmentation" else _Logits(built)
    if normalize:
        zeros, ones = (0.0,) * facts.in_channels, (1.0,) * facts.in_channels
        plain = nn.Sequential(TeacherInput(zeros, ones, facts.mean, facts.std), plain)
    whole = (("batch", "height", "width"),) if facts.task == "segmentation" else ()
    # Two images, since `torch.export` treats a batch size of one as a constant.
    example = torch.rand(2, *size, generator=draw)
    names = ("embedding",) if facts.task == "representation" else ("logits",)
    return PlainStudent(plain.eval(), plain.eval(), names, example, (*whole, ("batch",), ()))


def named_model(card: Mapping[str, Any], path: str | Path, trust: Sequence[str] = ()) -> str:
    """Return the model name of a card, if it is of a known library or of a trusted file or module.

    Raises:
        ValueError: if it names no model, or untrusted code.
    """
    name = card.get("model")
    if not isinstance(name, str):
        raise ValueError(f"{path} has no card that says which model it is; give --model, such as cifar/resnet20")
    code = code_of_model(name)
    if code is not None and not Trust(trust).includes(code):
        raise ValueError(
            f"the card of {path} names code to run, {name!r}; if you trust it, give it yourself: --model {name}, or"
            f"{trust_words([code])}"
        )
    return name


class _Logits(nn.Module):
    """A classifier that returns logits as a tensor instead of an output object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


_FOUND = ("boxes", "scores", "labels")


class _Embedding(nn.Module):
    """A model without classifier that returns its embedding as a tensor."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.model = model
        self._layers = list_layers(model, example)

    def forward(self, images: Tensor) -> Tensor:
        return read_embedding(self._layers, self.model(images))


class _EachImage(nn.Module):
    """An unchanged detector for images (B, 3, H, W), in each of which it finds as many objects, or for one image."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.detector(list(images))
        if len(found) == 1 and not isinstance(self.detector, TransformersDetector):
            return found[0]["boxes"], found[0]["scores"], found[0]["labels"]
        boxes, scores, labels = (torch.stack([one[name] for one in found]) for name in _FOUND)
        return boxes, scores, labels


def facts_of_card(card: Mapping[str, Any], path: str | Path, image_size: Sequence[int] | None = None) -> DataFacts:
    """Return the facts of the data that a student was trained on, without an example.

    Args:
        card: the card of the student.
        path: its file, for messages.
        image_size: (H, W), or one side of a square; None: the card's.

    Raises:
        ValueError: if the card lacks a value, or has an unknown task or no image size.
    """
    task = card.get("task", "classification")
    if task not in get_args(TaskName):
        raise ValueError(f"the card of {path} is for {task!r}, which is none of {', '.join(get_args(TaskName))}")
    sides = tuple(_card_value(card, "image_size") if image_size is None else image_size)
    size = sides * 2 if len(sides) == 1 else sides
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size {list(sides)} is no height and width in pixels; give --image_size=[224,224]")
    trained = card.get("image_size") or size
    shorter, longer = _detector_sizes(card, path) if task == "detection" else (None, None)
    return DataFacts(
        num_classes=int(_card_value(card, "num_classes")),
        in_channels=int(_card_value(card, "in_channels")),
        image_size=size,
        mean=tuple(card.get("mean") or IMAGENET_MEAN),
        std=tuple(card.get("std") or IMAGENET_STD),
        classes=tuple(card.get("classes") or ()),
        example=None,
        task=task,
        min_size=shorter or (min(trained),),
        max_size=longer or max(1333, *trained),
        multi_label=task == "classification" and bool(card.get("multi_label")),
        pixel_unit=None if card.get("scaled") is False else 1.0,
    )


def _detector_sizes(card: Mapping[str, Any], path: str | Path) -> tuple[tuple[int, ...] | None, int | None]:
    """Return the shorter sides that a detector's images were trained at, and the longest, where the card says them."""
    arguments = (card.get("data") or {}).get("init_args") or {}
    found: dict[str, tuple[int, ...]] = {}
    for name in ("min_size", "max_size"):
        value = arguments.get(name) or []
        found[name] = tuple(value if isinstance(value, list) else [value])
        if not all(type(side) is int and side > 0 for side in found[name]):
            raise ValueError(f"the card of {path} has a {name} of no pixels, {value!r:.80}: correct it")
    return found["min_size"] or None, max(found["max_size"], default=None)


def _card_value(card: Mapping[str, Any], name: str) -> Any:
    if card.get(name) is None:
        raise ValueError(
            f"there is no card that says {name!r}: put a .json of the weights' name beside them, such as "
            '{"model": "cifar/resnet20", "num_classes": 10, "in_channels": 3, "image_size": [32, 32]}, or export as '
            ".safetensors"
        )
    return card[name]
