"""The options of a training: everything that `diffkd fit` takes besides the data."""

import math
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from diffkd.distill.balance import Balance
from diffkd.distill.matching import Pair
from diffkd.distill.ramp import ALWAYS, Ramp
from diffkd.methods import MethodFactory
from diffkd.tasks.options import DEFAULT_DETECTION, DEFAULT_SEGMENTATION, DetectionOptions, SegmentationOptions
from diffkd.teacher.cache import Storage
from diffkd.teacher.options import TeacherOptions
from diffkd.training.optimization import OptimizerFactory, Schedule

Compile = bool | Literal["reduce-overhead", "max-autotune"]

DEFAULT_OPTIMIZER: OptimizerFactory = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
DEFAULT_SCHEDULE = Schedule("cosine")
FOLDED = TeacherOptions(fold=True)


@dataclass(frozen=True)
class Teacher:
    """One of several teachers.

    Args:
        name: of the model.
        weights: as teacher_weights.
        weights_key: as teacher_weights_key.
        pretrained: use its published weights; by default as teacher_pretrained.
        options: how it runs, and what its images are; by default as teacher_options.
        weight: factor of the losses of its automatic pairs.
    """

    name: str
    weights: str | None = None
    weights_key: str | None = None
    pretrained: bool | None = None
    options: TeacherOptions | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_name("the teacher", self.name)
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} of teacher {self.name} is no factor of a loss: give 0 or more")


def _check_name(what: str, name: Any) -> None:
    """Raise TypeError if a model is given instead of its name, by which a run records how it is built."""
    if not isinstance(name, str):
        raise TypeError(
            f"{what} is a {type(name).__name__}, and a name is wanted, by which the run can build it again: such as "
            "cifar/resnet20, timm/resnet18, or own.module:function for a function of yours that returns it. Modules "
            "that are built already are distilled by diffkd.Distiller in a loop of your own (docs/loops.md)"
        )


@dataclass(frozen=True)
class FitOptions:
    """What is trained, and how the training runs.

    Args:
        student: model to train: cifar/resnet20, timm/..., torchvision/..., hf/..., hub:USER/NAME, own.module:function.
        out: folder of the run; must be new or empty, unless `resume`.
        teacher: name of the model to learn from, or a list of several; left out: plain training.
        teacher_weights: file of its weights, or the folder of its run, or of transformers.
        teacher_weights_key: prefix of the weights' names, if the file holds several sets.
        teacher_pretrained: use its published weights.
        teacher_options: how it runs: BatchNorms folded, lower precision, channels last.
        teacher_cache: folder that caches its features for all epochs and students.
        teacher_cache_storage: dtype of the cached features.
        teacher_views: with augmentation: number of epochs of augmented images, then repeated.
        student_weights: file, or folder of a run, to start the student from.
        student_weights_key: as teacher_weights_key, for the student.
        student_pretrained: start the student from its published weights.
        pretrained_backbone: start a detector's or segmenter's backbone from published weights.
        backbone_weights: likewise, from the file or run of a classifier.
        inherit_neck_and_head: start all but the student's backbone from the teacher's weights.
        method: distillation method: diffkd.DiffKD, diffkd.KD, diffkd.DIST, or one of your own; or a list of them,
            each with its own automatic pairs.
        pairs: which student layer learns from which teacher layer; "auto" pairs them automatically.
        task_weight: factor of the task's own loss.
        method_weight: factor of all distillation losses.
        method_ramp: when the distillation losses apply: start, warm-up and stop, in epochs.
        balance: gradient-based weight of the automatic pairs on features and detectors' outputs, such as {balance: 1.0}
            for the gradient norm of the task's loss; in given pairs, set it as their weight.
        epochs: length of the training.
        optimizer: any optimiser, such as torch.optim.AdamW, with its own defaults.
        schedule: how the learning rate changes over the epochs.
        decay_all: weight decay on all parameters; false: not on biases and normalisation layers.
        label_smoothing: share of the label that is spread over all classes.
        detection: how detectors are built.
        segmentation: windows of the evaluation, auxiliary head, for segmentation.
        ema: decay of an exponential moving average of the student, which is then evaluated and saved.
        gradient_clip: largest norm of the gradient.
        accumulate: gradient accumulation: number of batches per optimiser step.
        precision: 32-true, bf16-mixed, 16-mixed, or another of Lightning's.
        seed: of initial weights, order, augmentation and noise.
        resume: resume the run in `out`, if there is one.
        max_steps: maximum number of steps.
        log_every: steps between two entries in the log.
        save_every_steps: steps between checkpoints within an epoch.
        channels_last: memory layout of student and teacher; by default on a CPU.
        compile: compile the training step; reduce-overhead and max-autotune record CUDA graphs.
        accelerator: cpu, gpu, mps, or auto.
        devices: how many, or which; the batch size is per device.
        num_nodes: number of machines, with equal devices.
        strategy: on several devices: auto is DDP, fsdp shards the parameters.
        logger: tensorboard (default), csv, wandb, mlflow, comet, or a class path; or a list.
        callbacks: of Lightning, likewise, such as EarlyStopping.
        sample_every: epochs between pictures of predictions.
        progress: show the progress; notebook: by tqdm.

    Raises:
        ValueError: if a number is out of range, or two options exclude each other.
    """

    student: str
    out: str | Path
    _: KW_ONLY
    teacher: list[str | Teacher] | str | None = None
    teacher_weights: str | None = None
    teacher_weights_key: str | None = None
    teacher_pretrained: bool = False
    teacher_options: TeacherOptions = FOLDED
    teacher_cache: str | Path | None = None
    teacher_cache_storage: Storage = "float16"
    teacher_views: int | None = None
    student_weights: str | None = None
    student_weights_key: str | None = None
    student_pretrained: bool = False
    pretrained_backbone: bool = False
    backbone_weights: str | None = None
    inherit_neck_and_head: bool = False
    method: list[MethodFactory] | MethodFactory | None = None
    pairs: Literal["auto"] | list[Pair] = "auto"
    task_weight: float = 1.0
    method_weight: float = 1.0
    method_ramp: Ramp = ALWAYS
    balance: Balance | None = None
    epochs: int = 100
    optimizer: OptimizerFactory = DEFAULT_OPTIMIZER
    schedule: Schedule = DEFAULT_SCHEDULE
    decay_all: bool = True
    label_smoothing: float = 0.0
    detection: DetectionOptions = DEFAULT_DETECTION
    segmentation: SegmentationOptions = DEFAULT_SEGMENTATION
    ema: float | None = None
    gradient_clip: float | None = None
    accumulate: int = 1
    precision: str = "32-true"
    seed: int = 0
    resume: bool = False
    max_steps: int | None = None
    log_every: int = 50
    save_every_steps: int | None = None
    channels_last: bool | None = None
    compile: Compile = False
    accelerator: str = "auto"
    devices: list[int] | int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    logger: Any = None
    callbacks: Any = None
    sample_every: int | None = None
    progress: bool | Literal["notebook"] = True

    @property
    def teachers(self) -> list[Teacher]:
        """All teachers, each with its options.

        Raises:
            ValueError: if one file of weights is given for several.
        """
        given = [self.teacher] if isinstance(self.teacher, str) else self.teacher or []
        if len(given) > 1 and self.teacher_weights is not None:
            raise ValueError(
                f"teacher_weights {self.teacher_weights} are of one teacher, and there are {len(given)}: give each its "
                "own in the list, as {name: NAME, weights: FILE}"
            )
        found = []
        for one in given:
            teacher = Teacher(one, self.teacher_weights, self.teacher_weights_key) if isinstance(one, str) else one
            published = self.teacher_pretrained and teacher.weights is None
            found.append(
                replace(
                    teacher,
                    pretrained=published if teacher.pretrained is None else teacher.pretrained,
                    options=self.teacher_options if teacher.options is None else teacher.options,
                )
            )
        return found

    def __post_init__(self) -> None:
        _check_name("student", self.student)
        if isinstance(self.teacher, list | tuple):
            for one in self.teacher:
                if not isinstance(one, Teacher):
                    _check_name("teacher", one)
        elif self.teacher is not None:
            _check_name("teacher", self.teacher)
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(
                f"gradient_clip={self.gradient_clip} is no norm of a gradient: give one above 0, or leave it out"
            )
        if self.sample_every is not None and self.sample_every < 1:
            raise ValueError(
                f"sample_every={self.sample_every} is no number of epochs: give at least 1, or leave it out"
            )
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}: so many batches make a step")
        if self.strategy == "fsdp" and self.compile:
            raise ValueError("compile works with strategy ddp, not with fsdp: leave one of the two out")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(
                f"seed={self.seed} does not fit into 64 bits, as PyTorch's generators want it: give a smaller one"
            )
