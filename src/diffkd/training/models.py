"""Building of student and teacher by name, and of the distiller."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from diffkd.data.seeding import mix_seed
from diffkd.distill.balance import Balance
from diffkd.distill.distiller import Distiller
from diffkd.distill.matching import Pair, wants_of
from diffkd.distill.stages import read_embedding
from diffkd.export.student_file import find_weights, read_card
from diffkd.features.forward import evaluation_mode, on_device_of, run
from diffkd.features.layers import list_layers
from diffkd.features.layout import Layout
from diffkd.features.memory_layout import try_channels_last
from diffkd.features.trace import OUTPUT
from diffkd.files.config import unwrap_factory
from diffkd.files.fitting import fit_contents, report_of
from diffkd.files.weights import check_savable, read_contents, unwrap
from diffkd.methods import DiffKD, MethodFactory
from diffkd.models import input_normalization
from diffkd.models.backbones import with_positions_of
from diffkd.models.detectors.from_transformers import TransformersDetector
from diffkd.models.detectors.teacher import DetectorTeacher
from diffkd.models.normalization import class_names, normalization_beside, own_size
from diffkd.models.weights import class_entries, fill_backbone, library_names, reorder_classes, same_draws
from diffkd.tasks.data_facts import DataFacts, check_unit, first_difference
from diffkd.tasks.options import DEFAULT_DETECTION, DetectionOptions
from diffkd.tasks.task_of_data import load, padded_example
from diffkd.teacher.options import AS_GIVEN, TeacherOptions
from diffkd.teacher.view import TeacherInput, same_normalization, view_of_detectors
from diffkd.training.start_checks import check_methods, check_needs


def check_teacher_and_method(teacher: object, method: object, pairs: Literal["auto"] | Sequence[Pair]) -> None:
    """Raise ValueError if there is a method without a teacher, or a teacher without a method."""
    taught = method is not None or pairs != "auto"
    if taught and not teacher:
        raise ValueError("a method needs a teacher to learn from: give --teacher, or leave the method and pairs out")
    if teacher and not taught:
        raise ValueError("a teacher needs a method: give --method, such as diffkd.DiffKD, or leave the teacher out")


def build_student(
    name: str,
    data: DataFacts,
    *,
    weights: str | None,
    pretrained: bool,
    seed: int,
    pretrained_backbone: bool = False,
    backbone_weights: str | None = None,
    auxiliary: bool = False,
    detection: DetectionOptions = DEFAULT_DETECTION,
    weights_key: str | None = None,
    notes: list[str] | None = None,
) -> nn.Module:
    """Build the student; its initial weights depend on the seed alone, not on teacher or method.

    Args:
        name: as for :func:`~diffkd.models.load_model`.
        data: gives the number of classes and channels.
        weights: file to start from, None for none. If its classes differ, the classifier is not loaded.
        pretrained: start from the published weights.
        seed: of the initial weights.
        pretrained_backbone: start the backbone alone from its published weights.
        backbone_weights: start the backbone alone from a classifier's file, or the folder of a run that trained one.
        auxiliary: build a segmenter with an auxiliary head.
        detection: how a detector is built.
        weights_key: prefix of the weights' names in the file, if it holds several sets.
        notes: receives lines about which weights were loaded, and whether their normalisation differs from the data's.

    Raises:
        ValueError: if the model cannot take the images or be saved, or its number of classes is not that of the data.
    """
    if backbone_weights is not None:
        _check_backbone_weights(backbone_weights, data, weights, pretrained or pretrained_backbone)
    if weights is not None and data.task in ("detection", "segmentation") and _is_backbone(weights):
        _check_backbone_weights(weights, data, None, pretrained or pretrained_backbone)
        weights, backbone_weights = None, weights
    own_norm = backbone_weights is not None and data.task == "detection" and not name.startswith("hf/")
    if own_norm and detection.norm == "auto":
        detection = replace(detection, norm="frozen")  # as for published weights
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
        weights_key=weights_key,
        new_head=True,
    )
    if backbone_weights is not None:
        filled = fill_backbone(student, name, find_weights(backbone_weights), key=weights_key)
        if notes is not None:
            notes.append(f"the student's backbone: {filled}")
    if notes is not None:
        notes.extend(_notes_of_student(name, student, data, weights, pretrained))
    if pretrained and data.task in ("classification", "detection"):
        wider = partial(_load_wider, name, data, data.in_channels, auxiliary, detection)
        _map_classes(student, class_names(student), data, wider)
    check_savable(student)
    if not student.training:
        student.train()  # functions may return a loaded model in evaluation mode, which the trainer would keep
    last = list_layers(student, padded_example(data, student))[-1]
    if last.name != OUTPUT and data.task != "representation":
        raise ValueError(
            f"student {name} returns several tensors, and its class scores as {last.name}, where the loss of the task "
            "does not look: let it return the scores first, or in a mapping as 'logits'"
        )
    output = last.shape
    expected, rank = f"(2, {data.num_classes})", 2
    if data.task == "representation":
        with evaluation_mode(student), torch.no_grad():
            read_embedding(list_layers(student, data.example), run(student, on_device_of(student, data.example)))
        return student
    if data.task == "segmentation":
        expected, rank = f"(2, {data.num_classes}, h, w)", 4
    if data.task != "detection" and (len(output) != rank or output[1] != data.num_classes):
        raise ValueError(
            f"student {name} returns {output} for two images, but the data have {data.num_classes} classes: it must "
            f"return {expected}; let its function take num_classes, or give other data"
        )
    return student


def _is_backbone(weights: str) -> bool:
    """Whether the card of a file says that it holds a model without head, distilled without labels."""
    return read_card(find_weights(weights)).get("task") == "representation"


def _check_backbone_weights(file: str, data: DataFacts, weights: str | None, published: bool) -> None:
    """Raise ValueError if a file for the backbone alone does not fit the task or the other options."""
    if data.task == "classification":
        raise ValueError(f"backbone_weights {file} are for detectors and segmenters; give a classifier student_weights")
    if weights is not None or published:
        other = f"student_weights {weights}" if weights is not None else "published weights"
        raise ValueError(f"the backbone cannot start from both {file} and {other}: leave one of them out")


def _notes_of_student(
    name: str, student: nn.Module, data: DataFacts, weights: str | None, pretrained: bool
) -> list[str]:
    report = report_of(student)
    notes = [] if report is None or report.plain else [f"student: {report}"]
    if data.task == "detection" or not (pretrained or weights is not None):
        return notes
    card: Mapping[str, Any] = {}
    theirs: Any = None
    if weights is not None:
        path = find_weights(weights)
        card = read_card(path)
        theirs = (tuple(card["mean"]), tuple(card["std"])) if card.get("mean") else normalization_beside(path)
    if theirs is None and not card:
        theirs = input_normalization(student, name)
    if theirs is not None and not same_normalization(theirs, (data.mean, data.std)):
        mean, std = (f"[{','.join(f'{value:.4g}' for value in values)}]" for values in theirs)
        notes.append(
            f"warning: student {name} starts from weights of images normalised by mean {mean} and std {std}, but the "
            f"data's are normalised by {list(data.mean)} and {list(data.std)}: give --data.mean={mean} --data.std={std}"
            + (f", each value times {data.pixel_unit:g}" if data.pixel_unit not in (1.0, None) else "")
        )
    return notes


def build_teacher(
    name: str,
    data: DataFacts,
    *,
    weights: str | None,
    pretrained: bool,
    detection: DetectionOptions = DEFAULT_DETECTION,
    weights_key: str | None = None,
    options: TeacherOptions = AS_GIVEN,
    notes: list[str] | None = None,
) -> tuple[nn.Module, TeacherInput | None]:
    """Build the frozen teacher with the classes of its weights, and the transform from the data's images to its own.

    Classes, normalisation and size of its images are taken from `options`, else from the card beside the weights, else
    the classes from the weights, and the normalisation from a preprocessor_config.json beside them or as published for
    the model. Images are resized to the size that the teacher requires or that its card says it was trained with.

    Args:
        name: as for :func:`~diffkd.models.load_model`.
        data: what the student sees.
        weights: file of the teacher's weights, None for published ones.
        pretrained: use the published weights.
        detection: how a detector is built.
        weights_key: prefix of the weights' names in the file, if it holds several sets.
        options: the user's values for its images and classes.
        notes: receives a line about the normalisation and size of its images, with their source.

    Returns:
        The teacher, and the transform of the images (None: the same as the student's).

    Raises:
        ValueError: if there are no weights, since an untrained teacher is useless.
    """
    own_code = ":" in name and not name.startswith(("timm/", "hf/", "isa/", "isa,"))
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
    elif classes is None and path is not None and data.task != "representation":
        classes = _classes_in(path, name, data, channels, detection, weights_key)
    plain = data.task == "representation" and card.get("task") == "classification"  # its classifier is left out
    if card.get("task", data.task) != data.task and not plain:
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
        weights_key=weights_key,
        new_head=True,
    )
    if data.task != "representation":
        _check_head(name, teacher)
    teacher = unwrap(teacher)  # hooks do not work on a compiled model, and a frozen one needs no DDP wrapper
    report = report_of(teacher)
    found = [] if report is None or report.plain else [f"teacher: {report}"]
    names = options.classes or (() if card.get("classes") else class_names(teacher))
    if data.task == "representation":
        names = ()
    if names and _map_classes(teacher, names, data, partial(_load_wider, name, data, channels, auxiliary, detection)):
        found.append("its classes are brought into the order of the data")
    if notes is not None:
        notes.extend(found)
    if data.task == "detection":
        return teacher, None  # a detector normalises its images itself
    if options.image_size is not None and data.task != "segmentation":
        teacher = _at_size(teacher, data, (options.image_size, options.image_size))
    view, said = _view(name, teacher, path, card, data, options, published=pretrained or path is not None)
    if notes is not None:
        notes.append(said)
    return teacher, view


def _load_wider(
    name: str, data: DataFacts, channels: int | None, auxiliary: bool, detection: DetectionOptions, count: int
) -> nn.Module:
    """Return the same model for `count + 1` classes."""
    return load(name, data, num_classes=count + 1, in_channels=channels, auxiliary=auxiliary, detection=detection)


def _map_classes(model: nn.Module, names: Sequence[str], data: DataFacts, wider: Callable[[int], nn.Module]) -> bool:
    """Reorder the classes of a model as in the data, in place, if they have the same names.

    Returns:
        Whether they were in another order.

    Raises:
        ValueError: if its layers do not allow that.
    """
    if first_difference(names, data.classes) is None or sorted(names) != sorted(data.classes):
        return False
    with same_draws():
        other = wider(len(names))
    reorder_classes(model, other, [list(names).index(one) for one in data.classes])
    return True


def _view(
    name: str,
    teacher: nn.Module,
    path: Path | None,
    card: Mapping[str, Any],
    data: DataFacts,
    options: TeacherOptions,
    *,
    published: bool,
) -> tuple[TeacherInput | None, str]:
    """Return the transform from the student's images to the teacher's, and a line that describes it and its source."""
    beside = None if path is None or card else normalization_beside(path)
    theirs: Any
    if options.mean is not None and options.std is not None:
        theirs, source = (options.mean, options.std), "as --teacher_options says"
    elif card.get("mean"):
        check_unit(card.get("scaled"), data, f"teacher {path}")
        theirs, source = (tuple(card["mean"]), tuple(card["std"])), "as its card says"
    elif beside is not None:
        theirs, source = beside, "as the file beside its weights says"
    elif published and (known := input_normalization(teacher, name)) is not None:
        theirs, source = known, f"as published for {name}"
    else:
        theirs = (data.mean, data.std)
        source = "as the data's, since nothing says otherwise; --teacher_options.mean and .std would"
    if len(theirs[0]) != len(data.mean):
        if options.mean is not None:
            raise ValueError(
                f"teacher_options.mean has {len(theirs[0])} values, the images have {len(data.mean)} channels: "
                "give one for each"
            )
        theirs, source = (data.mean, data.std), "as the data's, which have other channels than is said of it"
    size, why = _size(teacher, card, data, options)
    numbers = " and ".join(
        f"{what} ({', '.join(f'{value:.4g}' for value in values)})"
        for what, values in zip(("mean", "std"), theirs, strict=True)
    )
    said = f"teacher {name} sees images normalised by {numbers}, {source}"
    if size is not None:
        said += f"; resized to {size[0]}x{size[1]}, {why}"
    if size is None and same_normalization(theirs, (data.mean, data.std)):
        return None, said
    return TeacherInput(data.mean, data.std, theirs[0], theirs[1], size), said


def _size(
    teacher: nn.Module, card: Mapping[str, Any], data: DataFacts, options: TeacherOptions
) -> tuple[tuple[int, int] | None, str]:
    """Return the height and width to resize a teacher's images to, and the reason; None: the student's size."""
    if options.image_size is not None:
        side = options.image_size
        return None if (side, side) == data.image_size else (side, side), "as --teacher_options.image_size says"
    if data.task not in ("classification", "representation"):
        return None, ""  # for segmentation the scale of the objects matters, not the size of the crops
    trained = card.get("image_size")
    if trained:
        size = (int(trained[0]), int(trained[-1]))
        return None if size == tuple(data.image_size) else size, "which its card says it was trained with"
    made = own_size(teacher)
    if made is None or made == tuple(data.image_size) or _takes(teacher, data):
        return None, ""
    return made, "the only size that it takes"


def _at_size(teacher: nn.Module, data: DataFacts, size: tuple[int, int]) -> nn.Module:
    """Return a teacher that takes images of a size, with resampled positions if it does not take them as it is."""
    other = replace(data, image_size=size, example=torch.zeros(2, data.in_channels, *size))
    return teacher if own_size(teacher) == size or _takes(teacher, other) else with_positions_of(teacher, size)


def _takes(teacher: nn.Module, data: DataFacts) -> bool:
    """Whether a teacher can be run on images of the data's size."""
    try:
        with evaluation_mode(teacher), torch.no_grad():
            run(teacher, padded_example(data, teacher))
    except Exception:  # models may raise anything for images of another size
        return False
    return True


# The parts of a detector on a pyramid and of a segmenter of smp that a student can inherit, and in which layers take
# the maps of the backbone, whose widths may differ.
_BODIES = ("backbone.body.", "encoder.")
_BESIDE_THE_BODY = ("backbone.fpn.inner_blocks.", "decoder.")


@torch.no_grad()
def inherit_neck_and_head(student: nn.Module, teacher: nn.Module) -> None:
    """Copy all weights except the backbone body's from the teacher to the student, in place.

    The inheriting strategy of detectors of one family (Kang, Zhang, Zhang, Sun, Zheng, *Instance-Conditional Knowledge
    Distillation for Object Detection*, NeurIPS 2021), which FGD and MGD use; likewise for segmenters of one
    architecture, decoder and head. Layers that take the body's maps, such as the pyramid's lateral convolutions, stay
    the student's own where its body has other widths.

    Raises:
        ValueError: if other weights differ in name or shape.
    """
    ours, theirs = (
        {name: value for name, value in model.state_dict().items() if not name.startswith(_BODIES)}
        for model in (student, teacher)
    )
    apart = [name for name in ours if name not in theirs or ours[name].shape != theirs[name].shape]
    # Layers with all that belongs to them, such as the bias of a convolution.
    own = tuple(name.rpartition(".")[0] + "." for name in apart if name.startswith(_BESIDE_THE_BODY) and name in theirs)
    apart = [name for name in apart if not name.startswith(own)] + [name for name in theirs if name not in ours]
    if apart or not any(name.startswith(_BODIES) for name in student.state_dict()):
        raise ValueError(
            "the student cannot inherit the teacher's neck and head, which differ in "
            f"{apart[0] if apart else _BODIES[0]!r}: leave inherit_neck_and_head out, or give detectors of one family "
            "with equal pyramids, or segmenters of one architecture"
        )
    for name, value in theirs.items():
        if not name.startswith(own):
            ours[name].copy_(value)


def build_distiller(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    teacher_input: TeacherInput | Sequence[TeacherInput | None] | None,
    *,
    data: DataFacts,
    pairs: Literal["auto"] | Sequence[Pair],
    method: MethodFactory | Sequence[MethodFactory] | None,
    seed: int,
    teacher_options: TeacherOptions | Sequence[TeacherOptions] = AS_GIVEN,
    balance: Balance | None = None,
    weights: Sequence[float] | None = None,
) -> Distiller:
    """Build the distiller; the methods' initial weights depend on the seed alone.

    Of a detector as teacher only the backbone runs, on the images from the student's transform, and the heads only if
    their outputs are distilled. Other tasks take lists of teachers, inputs, options, and weights of their pairs.

    Raises:
        ValueError: if a method does not support the data's task, or needs arguments that the task does not provide.
    """
    torch.manual_seed(mix_seed(seed, 1))
    teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    for side, model in (("student", student), *(("teacher", one) for one in teachers)):
        if isinstance(unwrap(model), torch.jit.ScriptModule):
            raise ValueError(
                f"the {side} is a program of torch.jit.script, whose layers cannot be watched: let its function return "
                "the module itself; weights that were saved from the program fit it"
            )
    if not isinstance(pairs, str):
        pairs = [pair if pair.method is None else replace(pair, method=_method(pair.method)) for pair in pairs]
    methods = [DiffKD] if method is None else method if isinstance(method, Sequence) else [method]
    factories = [unwrap_factory(one) for one in methods]
    own = [] if isinstance(pairs, str) else [pair.method for pair in pairs]
    check_methods([*factories, *own] if isinstance(pairs, str) or None in own else own, data)
    view: Any = teacher_input
    model_of_teacher: Any = teachers[0] if len(teachers) == 1 else teachers
    if data.task == "detection":
        if len(teachers) > 1:
            raise ValueError(
                f"{len(teachers)} teachers need images of one size, which a detector draws anew in every step: give one"
            )
        if isinstance(pairs, str) and isinstance(student, TransformersDetector):
            _check_backbone(student)
        if not isinstance(pairs, str):
            pairs = [_read_as_detectors(pair) for pair in pairs]
        wanted = (
            any("box outputs" in wants_of(factory) for factory in factories)
            if isinstance(pairs, str)
            else any(not name.startswith("backbone") for pair in pairs for name in pair.teacher_names)
        )
        view = view_of_detectors(student, teachers[0], heads=wanted)
        model_of_teacher = DetectorTeacher(teachers[0].eval(), heads=wanted)
        teachers = [model_of_teacher]
    example = padded_example(data, student, *teachers)
    options = [teacher_options] if isinstance(teacher_options, TeacherOptions) else teacher_options
    distiller = Distiller(
        student,
        model_of_teacher,
        pairs,
        example=example,
        method=factories,
        teacher_input=view,
        teacher_options=[one.running for one in options] if len(options) > 1 else options[0].running,
        teacher_weights=weights,
        balance=balance,
        representations=data.task == "representation",
    )
    check_needs(distiller, data)
    return distiller


def _check_backbone(student: TransformersDetector) -> None:
    """Raise ValueError if the backbone of a student of transformers is frozen.

    Automatic pairing would otherwise take the outputs of its queries for maps.
    """
    backbone = student.feature_backbone()
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError(
            f"the backbone of student {type(student.model).__name__} is frozen by transformers, so that nothing of it "
            "can learn from the teacher's features: take a detector whose backbone is trained, such as RT-DETR or "
            "D-FINE, or name pairs yourself"
        )


def _read_as_detectors(pair: Pair) -> Pair:
    """Return the pair with the known layouts of a detector's outputs, where none is given.

    Layouts cannot be inferred from the size of the images, since a detector resizes and pads them.
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


def use_channels_last(model: nn.Module, data: DataFacts, channels_last: bool | None, accelerator: str) -> bool:
    """Convert a model to channels_last memory format, if requested and the model runs in it; None: on a CPU.

    Returns:
        Whether the model was converted.
    """
    if channels_last is None:
        channels_last = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    return channels_last and try_channels_last(model, padded_example(data, model))


def _method(method: Any) -> Any:
    return method if isinstance(method, nn.Module) else unwrap_factory(method)


def _check_head(name: str, teacher: nn.Module) -> None:
    """Raise ValueError if a teacher's classifier was left random although its file holds one."""
    report = report_of(teacher)
    if report is not None and report.of_other_shape:
        raise ValueError(
            f"{report.path} does not fit teacher {name}: {', '.join(report.of_other_shape[:3])} are of another number "
            "of classes than its card or its other layers say; correct the card"
        )


def _classes_in(
    weights: Path, name: str, data: DataFacts, channels: int | None, detection: DetectionOptions, key: str | None
) -> int:
    """Return the number of classes of the weights, from the entries in which models of K and K + 1 classes differ."""
    classes = data.num_classes
    with same_draws():
        ours, larger = (
            load(name, data, num_classes=count, in_channels=channels, detection=detection)
            for count in (classes, classes + 1)
        )
        fit = fit_contents(ours, weights, read_contents(weights), key, library_names)
    own = ours.state_dict()
    theirs = {**fit.filled, **fit.shapes}
    found = {
        classes + (len(theirs[entry]) - len(own[entry])) / growth
        for entry, growth in class_entries(ours, larger).items()
        if entry in theirs and theirs[entry].ndim
    }
    count = found.pop() if len(found) == 1 else 0
    return int(count) if count >= 1 and count == int(count) else classes
