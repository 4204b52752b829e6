"""What is trained, put together from the values of a run."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from diffkd.distill.matching import Pair
from diffkd.distill.ramp import ALWAYS, Ramp
from diffkd.methods import MethodFactory
from diffkd.tasks.data_facts import facts_of
from diffkd.tasks.detection import DetectionOptions
from diffkd.tasks.segmentation import SegmentationOptions
from diffkd.tasks.task_of_data import DEFAULT_DETECTION, DEFAULT_SEGMENTATION, build_task
from diffkd.teacher.cache import Storage
from diffkd.teacher.options import TeacherOptions
from diffkd.training.cached_teacher import CachedTeacher, describe_teacher
from diffkd.training.lightning_module import Training
from diffkd.training.models import build_distiller, build_student, build_teacher, check_teaching, inherit, lay_out
from diffkd.training.optimization import OptimizerFactory, Schedule, takes_channels_last
from diffkd.training.start_checks import check_classes, check_teacher_classes, check_type, tell_data

Compile = bool | Literal["reduce-overhead", "max-autotune"]

DEFAULT_OPTIMIZER: OptimizerFactory = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
DEFAULT_SCHEDULE = Schedule("cosine")
FOLDED = TeacherOptions(fold=True)


def build_training(
    student: str,
    data: LightningDataModule,
    *,
    teacher: str | None = None,
    teacher_weights: str | None = None,
    teacher_pretrained: bool = False,
    teacher_options: TeacherOptions = FOLDED,
    teacher_cache: str | Path | None = None,
    teacher_views: int | None = None,
    teacher_cache_storage: Storage = "float16",
    student_weights: str | None = None,
    student_pretrained: bool = False,
    pretrained_backbone: bool = False,
    inherit_neck_and_head: bool = False,
    method: Sequence[MethodFactory] | MethodFactory | None = None,
    pairs: Literal["auto"] | Sequence[Pair] = "auto",
    task_weight: float = 1.0,
    method_weight: float = 1.0,
    method_ramp: Ramp = ALWAYS,
    epochs: int = 100,
    optimizer: OptimizerFactory = DEFAULT_OPTIMIZER,
    schedule: Schedule = DEFAULT_SCHEDULE,
    decay_all: bool = True,
    label_smoothing: float = 0.0,
    detection: DetectionOptions = DEFAULT_DETECTION,
    segmentation: SegmentationOptions = DEFAULT_SEGMENTATION,
    ema: float | None = None,
    seed: int = 0,
    log_every: int = 50,
    channels_last: bool | None = None,
    compile: Compile = False,
    accelerator: str = "auto",
    precision: str = "32-true",
    num_nodes: int = 1,
    **others: Any,
) -> Training:
    """Build student, teacher, distiller and task, and what trains them.

    Args:
        student, data, teacher, ...: as for :func:`~diffkd.training.fit.fit`.
        others: those of its arguments that say how a training runs, not what is trained; left aside.

    Raises:
        ValueError: if the arguments do not fit together.
    """
    check_teaching(teacher, method, pairs)
    facts = facts_of(data)
    check_classes(facts)
    model = build_student(
        student,
        facts,
        weights=student_weights,
        pretrained=student_pretrained,
        pretrained_backbone=pretrained_backbone,
        auxiliary=segmentation.auxiliary,
        detection=detection,
        seed=seed,
    )
    check_type(model, facts, precision)
    trained: nn.Module = model
    channels_last = takes_channels_last(optimizer) and lay_out(model, facts, channels_last, accelerator)
    teaching, whole, cached = [], None, None
    if teacher is not None:
        whole, view = build_teacher(
            teacher, facts, weights=teacher_weights, pretrained=teacher_pretrained, detection=detection
        )
        teaching = [whole]
        if inherit_neck_and_head:
            inherit(model, whole)
        if teacher_cache is not None or teacher_views is not None:
            cached = CachedTeacher(
                teacher_cache,
                identity={"teacher": describe_teacher(whole, view, teacher_options), "precision": precision},
                data=data,
                facts=facts,
                views=teacher_views,
                storage=teacher_cache_storage,
                num_nodes=num_nodes,
            )
        if not isinstance(pairs, str):
            pairs = [replace(pair, method=tell_data(pair.method, data)) for pair in pairs]
        methods = method if isinstance(method, Sequence) else [] if method is None else [method]
        trained = build_distiller(
            model,
            whole,
            view,
            data=facts,
            pairs=pairs,
            method=[tell_data(one, data) for one in methods] or None,
            seed=seed,
            teacher_options=replace(teacher_options, channels_last=True) if channels_last else teacher_options,
        )
        if teacher_weights is not None:
            check_teacher_classes(trained, teacher_weights, facts)
        if channels_last:
            trained.to(memory_format=torch.channels_last)
    training = Training(
        trained,
        build_task(facts, label_smoothing=label_smoothing, segmentation=segmentation, models=[model, *teaching]),
        optimizer=optimizer,
        schedule=schedule,
        epochs=epochs,
        decay_all=decay_all,
        task_weight=task_weight,
        method_weight=method_weight,
        method_ramp=method_ramp,
        ema=ema,
        seed=seed,
        log_every=log_every,
        teacher=whole if facts.task == "detection" else None,  # of which the distiller holds a part
    )
    training.cached_teacher = cached
    if compile:
        training.model.compile(mode=None if compile is True else compile)
    return training
