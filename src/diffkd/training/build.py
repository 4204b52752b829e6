"""Building of what is trained: student, teacher, distiller and task from the options of a training."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from diffkd.export.student_file import read_card
from diffkd.models.hub import fetch_student, is_hub
from diffkd.recipes.trust import code_of_model
from diffkd.tasks.data_facts import facts_of
from diffkd.tasks.options import DEFAULT_DETECTION, DetectionOptions
from diffkd.tasks.task_of_data import build_task
from diffkd.teacher.view import TeacherInput
from diffkd.training.cached_teacher import CachedTeacher, describe_teacher
from diffkd.training.lightning_module import Training
from diffkd.training.models import (
    build_distiller,
    build_student,
    build_teacher,
    check_teacher_and_method,
    inherit_neck_and_head,
    use_channels_last,
)
from diffkd.training.optimization import takes_channels_last
from diffkd.training.options import FitOptions
from diffkd.training.start_checks import (
    check_classes,
    check_learns,
    check_teacher_classes,
    check_teacher_head,
    check_type,
    set_data_arguments,
)


def build_training(options: FitOptions, data: LightningDataModule) -> Training:
    """Build student, teacher, distiller and task, and what trains them.

    Args:
        options: of the training; trainer options such as `devices` are ignored.
        data: the images and labels.

    Raises:
        ValueError: if the options do not fit together.
    """
    check_teacher_and_method(options.teacher, options.method, options.pairs)
    options = from_hub(options)
    facts = facts_of(data)
    check_classes(facts)
    check_learns(facts, options)
    notes: list[str] = []
    student = build_student(
        options.student,
        facts,
        weights=options.student_weights,
        weights_key=options.student_weights_key,
        notes=notes,
        pretrained=options.student_pretrained,
        pretrained_backbone=options.pretrained_backbone,
        backbone_weights=options.backbone_weights,
        auxiliary=options.segmentation.auxiliary,
        detection=options.detection,
        seed=options.seed,
    )
    check_type(student, facts, options.precision)
    model: nn.Module = student
    channels_last = takes_channels_last(options.optimizer) and use_channels_last(
        student, facts, options.channels_last, options.accelerator
    )
    teaching: list[nn.Module] = []
    cached = None
    embeds: list[Callable[[Any], Tensor]] = []
    teachers = options.teachers
    views: list[TeacherInput | None] = []
    running = [one.options or options.teacher_options for one in teachers]
    if teachers:
        for one, how in zip(teachers, running, strict=True):
            teacher, view = build_teacher(
                one.name,
                facts,
                weights=one.weights,
                pretrained=bool(one.pretrained),
                detection=options.detection,
                weights_key=one.weights_key,
                options=how,
                notes=notes,
            )
            teaching.append(teacher)
            views.append(view)
        if options.inherit_neck_and_head:
            inherit_neck_and_head(student, teaching[0])
        if options.teacher_cache is not None or options.teacher_views is not None:
            identities = [describe_teacher(*each) for each in zip(teaching, views, running, strict=True)]
            cached = CachedTeacher(
                options.teacher_cache,
                identity={
                    "teacher": identities[0] if len(identities) == 1 else identities,
                    "precision": options.precision,
                },
                data=data,
                facts=facts,
                views=options.teacher_views,
                storage=options.teacher_cache_storage,
                num_nodes=options.num_nodes,
            )
        pairs = options.pairs
        if not isinstance(pairs, str):
            pairs = [replace(pair, method=set_data_arguments(pair.method, data)) for pair in pairs]
        method = options.method
        methods = method if isinstance(method, Sequence) else [] if method is None else [method]
        distiller = build_distiller(
            student,
            teaching,
            views[0] if len(views) == 1 else views,
            data=facts,
            pairs=pairs,
            method=[set_data_arguments(one, data) for one in methods] or None,
            seed=options.seed,
            balance=options.balance,
            teacher_options=[replace(how, channels_last=True) if channels_last else how for how in running],
            weights=[one.weight for one in teachers],
        )
        embeds = [partial(distiller.teacher_embedding, source=index) for index in range(len(distiller.teachers))]
        for one, teacher, how in zip(teachers, teaching, running, strict=True):
            check_teacher_head(distiller, teacher)
            if one.weights is not None:
                check_teacher_classes(distiller, one.weights, facts, how.classes)
        if channels_last:
            distiller.to(memory_format=torch.channels_last)
        model = distiller
    training = Training(
        model,
        build_task(
            facts,
            label_smoothing=options.label_smoothing,
            segmentation=options.segmentation,
            models=[student, *teaching],
            teachers=embeds,
        ),
        optimizer=options.optimizer,
        schedule=options.schedule,
        epochs=options.epochs,
        decay_all=options.decay_all,
        task_weight=options.task_weight,
        method_weight=options.method_weight,
        method_ramp=options.method_ramp,
        ema=options.ema,
        seed=options.seed,
        log_every=options.log_every,
        teacher=teaching[0]
        if teaching and facts.task == "detection"
        else None,  # the distiller holds only a part of a detector
    )
    training.cached_teacher = cached
    training.notes = notes
    if options.compile:
        training.model.compile(mode=None if options.compile is True else options.compile)
    return training


def from_hub(options: FitOptions) -> FitOptions:
    """Return the options with student and teacher of the Hub as a model's name and a file of weights.

    Args:
        options: of the training; those without names of the Hub are returned as they are.

    Raises:
        ValueError: if there are weights for it already, or its card names no model, or one of somebody's own code.
        FileNotFoundError: if it is not on the Hub.
        OSError: if it cannot be fetched.
    """
    for side in ("student", "teacher"):
        name = getattr(options, side)
        if not is_hub(name):
            continue
        if getattr(options, f"{side}_weights") is not None or getattr(options, f"{side}_pretrained"):
            raise ValueError(f"{side} {name} brings its weights: leave {side}_weights and {side}_pretrained out")
        file = fetch_student(name)
        card = read_card(file)
        model = card.get("model")
        if not isinstance(model, str) or code_of_model(model) is not None:
            what = f"is of somebody's own code, {model!r}" if model else "has no card that says which model it is"
            raise ValueError(f"{side} {name} {what}: give the model yourself, --{side} MODEL --{side}_weights {name}")
        changes: dict[str, Any] = {side: model, f"{side}_weights": str(file)}
        if side == "student" and card.get("detection") and options.detection == DEFAULT_DETECTION:
            options = replace(options, detection=DetectionOptions(**card["detection"]))
        options = replace(options, **changes)
    return options
