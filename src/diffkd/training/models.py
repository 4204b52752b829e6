"""What a run trains: student and teacher by name, and the distiller that joins them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from diffkd.data.seeding import mix_seed
from diffkd.distill.distiller import Distiller
from diffkd.distill.matching import Pair, wants_of
from diffkd.export.student_file import find_weights, read_card
from diffkd.features.layers import list_layers
from diffkd.features.layout import Layout
from diffkd.features.memory_layout import try_channels_last
from diffkd.features.trace import OUTPUT
from diffkd.files.config import factory_of
from diffkd.files.weights import check_savable, read_weights
from diffkd.methods import DiffKD, MethodFactory
from diffkd.models import input_normalization
from diffkd.models.detectors.teacher import DetectorTeacher
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.detection import DetectionOptions
from diffkd.tasks.task_of_data import DEFAULT_DETECTION, load, padded_example
from diffkd.teacher.options import AS_GIVEN, TeacherOptions
from diffkd.teacher.view import DetectorView, TeacherInput, same_normalization, view_of_detectors
from diffkd.training.start_checks import check_methods, check_needs


def check_teaching(teacher: str | None, method: object, pairs: Literal["auto"] | Sequence[Pair]) -> None:
    """Raise ValueError if there is a method without a teacher, or a teacher without a method."""
    taught = method is not None or pairs != "auto"
    if taught and teacher is None:
        raise ValueError("a method needs a teacher to learn from: give --teacher, or leave the method and pairs out")
    if teacher is not None and not taught:
        raise ValueError("a teacher needs a method: give --method, such as diffkd.DiffKD, or leave the teacher out")


def build_student(
    name: str,
    data: DataFacts,
    *,
    weights: str | None,
    pretrained: bool,
    seed: int,
    pretrained_backbone: bool = False,
    auxiliary: bool = False,
    detection: DetectionOptions = DEFAULT_DETECTION,
) -> nn.Module:
    """Build the student; its initial weights depend on the seed alone, not on what it is trained with.

    Args:
        name: as for :func:`~diffkd.models.load_model`.
        data: says how many classes and channels there are.
        weights: file to start from, None for none.
        pretrained: start from the published weights.
        seed: of the initial weights.
        pretrained_backbone: start the backbone alone from its published weights.
        auxiliary: of a segmenter, with an auxiliary head.
        detection: how a detector is built.

    Raises:
        ValueError: if the model cannot take the images or be saved, or does not score as many classes as there are.
    """
    torch.manual_seed(seed)
    student = load(
        name,
        data,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        weights=None if weights is None else find_weights(weights),
        pretrained=pretrained,
        pretrained_backbone=pretrained_backbone,
        auxiliary=auxiliary,
        detection=detection,
    )
    check_savable(student)
    if not student.training:
        student.train()  # as functions leave models that they have loaded; the trainer would train it like that
    last = list_layers(student, padded_example(data, student))[-1]
    if last.name != OUTPUT:
        raise ValueError(
            f"student {name} returns several tensors, and its class scores as {last.name}, where the loss of the task "
            "does not look: let it return the scores first, or in a mapping as 'logits'"
        )
    output = last.shape
    expected, rank = f"(2, {data.num_classes})", 2
    if data.task == "segmentation":
        expected, rank = f"(2, {data.num_classes}, h, w)", 4
    if data.task != "detection" and (len(output) != rank or output[1] != data.num_classes):
        raise ValueError(
            f"student {name} returns {output} for two images, but the data have {data.num_classes} classes: it must "
            f"return {expected}; let its function take num_classes, or give other data"
        )
    return student


def build_teacher(
    name: str,
    data: DataFacts,
    *,
    weights: str | None,
    pretrained: bool,
    detection: DetectionOptions = DEFAULT_DETECTION,
) -> tuple[nn.Module, TeacherInput | None]:
    """Build the frozen teacher with the classes that its weights have, and what turns the data's images into its own.

    The card beside the weights, if there is one, says classes and normalisation; otherwise the weights themselves and
    the model's published normalisation do.

    Args:
        name: as for :func:`~diffkd.models.load_model`.
        data: what the student sees.
        weights: file of the teacher's weights, None for published ones.
        pretrained: use the published weights.
        detection: how a detector is built.

    Returns:
        The teacher, and its view of the images (None: the same as the student's).

    Raises:
        ValueError: if there are no weights: an untrained teacher has nothing to teach.
    """
    own_code = ":" in name and not name.startswith(("timm/", "hf/"))
    if weights is None and not pretrained and not own_code:
        raise ValueError(
            f"teacher {name} has no weights: give --teacher_weights FILE, or --teacher_pretrained for published ones"
        )
    path = None if weights is None else find_weights(weights)
    card = {} if path is None else read_card(path)
    channels = card.get("in_channels", data.in_channels)
    classes = card.get("num_classes")
    if classes is None and own_code:
        classes = data.num_classes
    elif classes is None and path is not None:
        classes = _classes_in(path, name, data, channels, detection)
    if card.get("task", data.task) != data.task:
        raise ValueError(f"teacher {path} is for {card['task']}, the data are for {data.task}; give another teacher")
    auxiliary = bool((card.get("segmentation") or {}).get("auxiliary"))
    teacher = load(
        name,
        data,
        num_classes=classes,
        in_channels=channels,
        weights=path,
        pretrained=pretrained,
        auxiliary=auxiliary,
        detection=DetectionOptions(**card["detection"]) if card.get("detection") else detection,
    )
    if data.task == "detection":
        return teacher, None  # which normalises its images itself
    theirs = (card["mean"], card["std"]) if card.get("mean") else None
    if theirs is None and pretrained:
        theirs = input_normalization(teacher, name)
    if theirs is None or same_normalization(theirs, (data.mean, data.std)):
        return teacher, None
    return teacher, TeacherInput(data.mean, data.std, theirs[0], theirs[1])


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module) -> None:
    """Copy all weights but those of the backbone's body from the teacher to the student, in place.

    The inheriting strategy of detectors of one family (Kang, Zhang, Zhang, Sun, Zheng, *Instance-Conditional Knowledge
    Distillation for Object Detection*, NeurIPS 2021), which FGD and MGD use.

    Raises:
        ValueError: if the two do not agree in these weights.
    """
    body = "backbone.body."
    ours, theirs = (
        {name: value for name, value in model.state_dict().items() if not name.startswith(body)}
        for model in (student, teacher)
    )
    apart = [name for name in ours if name not in theirs or ours[name].shape != theirs[name].shape]
    apart += [name for name in theirs if name not in ours]
    if apart or not any(name.startswith(body) for name in student.state_dict()):
        raise ValueError(
            f"the student cannot inherit the teacher's neck and head, which differ in {apart[0] if apart else body!r}: "
            "leave inherit_neck_and_head out, or give detectors of one family with equal pyramids"
        )
    for name, value in theirs.items():
        ours[name].copy_(value)


def build_distiller(
    student: nn.Module,
    teacher: nn.Module,
    teacher_input: TeacherInput | None,
    *,
    data: DataFacts,
    pairs: Literal["auto"] | Sequence[Pair],
    method: MethodFactory | Sequence[MethodFactory] | None,
    seed: int,
    teacher_options: TeacherOptions = AS_GIVEN,
) -> Distiller:
    """Join student and teacher; the methods' initial weights depend on the seed alone.

    Of a detecting teacher only the backbone runs, on the pixels that its student has made; and the heads where their
    outputs are distilled.

    Raises:
        ValueError: if a method is not for the data's task, or needs what that does not give.
    """
    torch.manual_seed(mix_seed(seed, 1))
    if not isinstance(pairs, str):
        pairs = [pair if pair.method is None else replace(pair, method=_method(pair.method)) for pair in pairs]
    methods = [DiffKD] if method is None else method if isinstance(method, Sequence) else [method]
    factories = [factory_of(one) for one in methods]
    own = [] if isinstance(pairs, str) else [pair.method for pair in pairs]
    check_methods([*factories, *own] if isinstance(pairs, str) or None in own else own, data)
    view: TeacherInput | DetectorView | None = teacher_input
    if data.task == "detection":
        if not isinstance(pairs, str):
            pairs = [_read_as_detectors(pair) for pair in pairs]
        wanted = (
            any("box outputs" in wants_of(factory) for factory in factories)
            if isinstance(pairs, str)
            else any(not name.startswith("backbone") for pair in pairs for name in pair.teacher_names)
        )
        view = view_of_detectors(student, teacher, heads=wanted)
        teacher = DetectorTeacher(teacher.eval(), heads=wanted)
    example = padded_example(data, student, teacher)
    distiller = Distiller(
        student,
        teacher,
        pairs,
        example=example,
        method=factories,
        teacher_input=view,
        teacher_options=teacher_options,
    )
    check_needs(distiller, data)
    return distiller


def _read_as_detectors(pair: Pair) -> Pair:
    """Return the pair with the layouts that a detector's outputs are known to have, where none is given.

    They cannot be told from the size of the images, since a detector resizes and pads those.
    """

    def known(names: Sequence[str], given: Layout | None) -> Layout | None:
        if given is None and all(name.startswith("backbone[") for name in names):
            return Layout("nchw")
        if given is None and all(name.endswith(("[cls_logits]", "[bbox_regression]")) for name in names):
            return Layout("rows")
        return given

    return replace(
        pair,
        student_layout=known(pair.student_names, pair.student_layout),
        teacher_layout=known(pair.teacher_names, pair.teacher_layout),
    )


def lay_out(model: nn.Module, data: DataFacts, channels_last: bool | None, accelerator: str) -> bool:
    """Lay a model out with the channels last, if that is wanted and it runs like that; None: on a CPU.

    Returns:
        Whether it was.
    """
    if channels_last is None:
        channels_last = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    return channels_last and try_channels_last(model, padded_example(data, model))


def _method(method: Any) -> Any:
    return method if isinstance(method, nn.Module) else factory_of(method)


def _classes_in(weights: Path, name: str, data: DataFacts, channels: int | None, detection: DetectionOptions) -> int:
    """Return how many classes the weights are for: the entries that grow with them are found by building two models."""
    classes = data.num_classes
    ours, larger = (
        load(name, data, num_classes=count, in_channels=channels, detection=detection).state_dict()
        for count in (classes, classes + 1)
    )
    found = {
        classes + (len(theirs) - len(ours[entry])) / growth
        for entry, theirs in read_weights(weights).items()
        if entry in ours and theirs.ndim and ours[entry].ndim and (growth := len(larger[entry]) - len(ours[entry]))
    }
    count = found.pop() if len(found) == 1 else 0
    return int(count) if count >= 1 and count == int(count) else classes
