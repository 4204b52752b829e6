"""`fit`: train a student, alone or with a teacher, and leave a folder with all that came of it."""

import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from diffkd.distill.matching import Pair
from diffkd.distill.ramp import ALWAYS, Ramp
from diffkd.export.student_file import make_card, read_card, versions, with_metrics
from diffkd.files.config import describe
from diffkd.files.lock import held
from diffkd.files.run_folder import RunFolder
from diffkd.files.weights import save_student
from diffkd.methods import MethodFactory
from diffkd.tasks.data_facts import facts_of
from diffkd.tasks.detection import DetectionOptions
from diffkd.tasks.distributed import device_name, is_first_process, strategy_for
from diffkd.tasks.segmentation import SegmentationOptions
from diffkd.tasks.task_of_data import DEFAULT_DETECTION, DEFAULT_SEGMENTATION
from diffkd.teacher.cache import Storage
from diffkd.teacher.options import TeacherOptions
from diffkd.training.build import DEFAULT_OPTIMIZER, DEFAULT_SCHEDULE, FOLDED, Compile, build_training
from diffkd.training.checkpointing import Saver, WholeFiles, check_resumable
from diffkd.training.lightning_module import Training
from diffkd.training.memory import freed_memory_kept, peak_memory, reset_peak
from diffkd.training.optimization import OptimizerFactory, Schedule
from diffkd.training.progress import TrainingProgress, quiet_trainer
from diffkd.training.start_report import StartReport


def fit(
    student: str,
    data: LightningDataModule,
    out: str | Path,
    *,
    teacher: str | None = None,
    teacher_weights: str | None = None,
    teacher_pretrained: bool = False,
    teacher_options: TeacherOptions = FOLDED,
    teacher_cache: str | Path | None = None,
    teacher_cache_storage: Storage = "float16",
    teacher_views: int | None = None,
    student_weights: str | None = None,
    student_pretrained: bool = False,
    pretrained_backbone: bool = False,
    inherit_neck_and_head: bool = False,
    method: list[MethodFactory] | MethodFactory | None = None,
    pairs: Literal["auto"] | list[Pair] = "auto",
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
    gradient_clip: float | None = None,
    accumulate: int = 1,
    precision: str = "32-true",
    seed: int = 0,
    resume: bool = False,
    max_steps: int | None = None,
    log_every: int = 50,
    save_every_steps: int | None = None,
    channels_last: bool | None = None,
    compile: Compile = False,
    accelerator: str = "auto",
    devices: list[int] | int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    progress: bool = True,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a student; with a teacher and a method, distil the teacher into it. The data say for which task.

    Args:
        student: name of the model to train: cifar/resnet20, timm/..., torchvision/..., hf/..., package.module:function.
        data: where images and labels come from; says how many classes and channels there are.
        out: folder of the run; must be new or empty, unless `resume`.
        teacher: name of the model to learn from; left out with `method` and `pairs`: plain training.
        teacher_weights: file of its weights, or the folder of the run that trained it.
        teacher_pretrained: use its published weights.
        teacher_options: how it runs: BatchNorms folded, lower precision, channels last.
        teacher_cache: folder that keeps its features for all epochs and students.
        teacher_cache_storage: type of the numbers there.
        teacher_views: with augmentation: repeat the images of so many epochs.
        student_weights: file, or folder of a run, to start the student from.
        student_pretrained: start the student from its published weights.
        pretrained_backbone: start only the backbone of a detector or segmenter from published weights.
        inherit_neck_and_head: start all of a detector but its backbone from the teacher's weights.
        method: distillation method: diffkd.DiffKD, diffkd.KD, diffkd.DIST, diffkd.FitNet, or one of your own; or a
            list of them, each then paired as it wants.
        pairs: which layers learn from which; "auto" finds out.
        task_weight: factor of the task's own loss, with the labels.
        method_weight: factor of all distillation losses.
        method_ramp: when in the training they count: start, warm-up and stop, in epochs.
        epochs: length of the training.
        optimizer: any, such as torch.optim.AdamW, which then starts from its own defaults.
        schedule: how the learning rate changes over the epochs.
        decay_all: weight decay on all parameters; false: not on biases and normalisation layers.
        label_smoothing: share of the label that is spread over all classes, for classification.
        detection: how detectors are built by name.
        segmentation: windows of the evaluation, auxiliary head, for segmentation.
        ema: decay of a running average of the student, which is then measured and saved.
        gradient_clip: largest norm of the gradient.
        accumulate: batches whose mean gradient makes a step, where a large batch does not fit into memory.
        precision: 32-true, bf16-mixed, 16-mixed, or another of Lightning's.
        seed: of initial weights, order, augmentation and noise.
        resume: go on with the run in `out`, if there is one.
        max_steps: stop after so many steps, to try a recipe out.
        log_every: steps between two entries in the log.
        save_every_steps: save within the epochs too, every so many steps.
        channels_last: memory layout of student and teacher; by default on a CPU.
        compile: compile the training step; reduce-overhead and max-autotune record CUDA graphs.
        accelerator: cpu, gpu, mps, or auto.
        devices: how many, or which; the batch size is per device.
        num_nodes: machines, each with as many devices.
        strategy: of training on several devices; auto takes DDP, fsdp spreads the parameters.
        progress: show how the training goes.
        config: what to record as the values of the run; None: these arguments.

    Returns:
        The result, as `result.json` in `out` holds it: "last" and "best" epoch with their accuracies, and more.

    Raises:
        FileExistsError: if `out` holds something and `resume` is off, or another run is working there.
        ValueError: if the arguments do not fit together.
        FloatingPointError: if the training diverges; names loss and step.
        Interrupted: if it was asked to stop by SIGINT or SIGTERM, after saving.
        KeyboardInterrupt: if it was asked twice.
    """
    values = dict(locals())
    if gradient_clip is not None and not gradient_clip > 0:
        raise ValueError(f"gradient_clip={gradient_clip} is no norm of a gradient: give one above 0, or leave it out")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}: so many batches make a step")
    if strategy == "fsdp" and compile:
        raise ValueError("compile works with strategy ddp, not with fsdp: leave one of the two out")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed} does not fit into 64 bits, as PyTorch's generators want it: give a smaller one")
    config = describe({name: value for name, value in values.items() if name != "config"}) if config is None else config
    config = {name: value for name, value in config.items() if name != "resume"}
    folder = RunFolder(out)
    first = is_first_process()
    console = Console(stderr=True, quiet=not (progress and first))
    with held(folder.path) if first else nullcontext():
        if (finished := folder.check(config, resume=resume)) is not None:
            console.print(f"{folder.path} is finished", soft_wrap=True)
            console.print(summary(finished), highlight=False, soft_wrap=True)
            return finished

        training = build_training(**{name: value for name, value in values.items() if name != "config"})
        check_resumable(training)
        parameters = sum(parameter.numel() for parameter in training.student.parameters())
        score = training.task.headlines[0]
        card = training.card = make_card(student, facts_of(data), config)
        if first:
            folder.start(config)

        def on_epoch(training: Training) -> None:
            row = training.history.rows[-1]
            if row[score] > read_card(folder.best).get("metrics", {}).get(score, -1.0):
                save_student(training.result, folder.best, with_metrics(card, row, "best epoch"))
            training.history.write_csv(folder.metrics)

        saver = Saver(
            folder.checkpoint,
            every_steps=save_every_steps,
            max_steps=max_steps,
            on_epoch=on_epoch,
            how_to_resume=f"Go on with: diffkd fit {shlex.quote(str(folder.config))} --resume",
        )
        resumes = resume and folder.checkpoint.is_file()
        if resume and not resumes:
            console.print(f"nothing to resume in {folder.path}; starting at the beginning", soft_wrap=True)
        reset_peak()
        with quiet_trainer(), freed_memory_kept():
            trainer = Trainer(
                accelerator=accelerator,
                devices=devices,
                num_nodes=num_nodes,
                strategy=strategy_for(strategy, devices, num_nodes),
                precision=precision,  # type: ignore[arg-type]  # checked by the trainer
                max_epochs=epochs,
                gradient_clip_val=gradient_clip,
                accumulate_grad_batches=accumulate,
                logger=TensorBoardLogger(folder.path, name="", version="tensorboard"),
                callbacks=[
                    StartReport(console),
                    TrainingProgress(console),
                    *filter(None, [training.cached_teacher]),
                    saver,
                ],
                plugins=[WholeFiles()],
                default_root_dir=folder.path,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                log_every_n_steps=1,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            try:
                trainer.fit(
                    training, datamodule=data, ckpt_path=folder.checkpoint if resumes else None, weights_only=True
                )
            except SystemExit as leaving:  # how the trainer answers a second Ctrl-C
                raise KeyboardInterrupt from leaving

        last = training.history.rows[-1]
        best = read_card(folder.best) or with_metrics({}, training.history.best, "best epoch")
        result = {
            "task": training.task.name,
            "score": score,
            "last": last,
            "best": {"epoch": best["epoch"], **best["metrics"]},
            "parameters": parameters,
            "method_parameters": sum(p.numel() for p in training.model.parameters()) - parameters,
            "peak_memory": peak_memory(trainer.strategy.root_device),
            "device": device_name(trainer),
            "seed": seed,
            "command": shlex.join(sys.argv),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(),
        }
        if first:
            save_student(training.result, folder.student, with_metrics(card, last, "last epoch"))
            folder.finish(result)
            console.print(summary(result), highlight=False, soft_wrap=True)
        return result


def summary(result: Mapping[str, Any]) -> str:
    """Return a result in one line: score of the last and the best epoch, parameters, seconds."""
    score = result["score"]
    scores = (
        f"{which} epoch ({int(result[which]['epoch'])}) {score} {100 * result[which][score]:.2f} %"
        for which in ("last", "best")
    )
    return f"{', '.join(scores)}; {result['parameters']:,} parameters, {result['last']['seconds']:.0f} s"
