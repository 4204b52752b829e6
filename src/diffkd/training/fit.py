"""`diffkd fit`: train a student, alone or with a teacher, and write a run folder."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from diffkd.export.student_file import make_card, read_card, versions, with_metrics
from diffkd.files.config import describe
from diffkd.files.lock import lock_folder
from diffkd.files.run_folder import RunFolder
from diffkd.files.weights import remove_partial, save_student
from diffkd.recipes.trust import own_code, trust_words
from diffkd.tasks.data_facts import facts_of
from diffkd.tasks.distributed import device_name, environments, is_first_process, strategy_for
from diffkd.training.build import build_training, from_hub
from diffkd.training.callbacks import StartReport, TrainingProgress, silence_lightning
from diffkd.training.checkpointing import AtomicCheckpointIO, Saver, check_resumable
from diffkd.training.lightning_module import Training, starts_within_epochs
from diffkd.training.memory import keep_freed_memory, peak_memory, reset_peak
from diffkd.training.options import FitOptions
from diffkd.training.plain_loaders import divided_loaders
from diffkd.training.trackers import SamplePictures, build_callbacks, build_loggers, check_monitored


def fit(
    student: str,
    data: LightningDataModule,
    out: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Mapping[str, Any], str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a student; with a teacher and a method, distil the teacher into it. The data determine the task.

    Args:
        student: name of the model to train, as for :class:`~diffkd.training.options.FitOptions`.
        data: the images and labels; determines the number of classes and channels.
        out: folder of the run; must be new or empty, unless `resume`.
        config: the configuration to record; None: these arguments.
        on_epoch: called after every epoch with its row of the history and the name of the score in it; an exception
            from it ends the training.
        options: further options of :class:`~diffkd.training.options.FitOptions`.

    Returns:
        The content of `result.json` in `out`: "last" and "best" epoch with their accuracies, and more.

    Raises:
        FileExistsError: if `out` is not empty and `resume` is off, or another run is working there.
        ValueError: if the arguments do not fit together.
        FloatingPointError: if the training diverges; names loss and step.
        Interrupted: on SIGINT or SIGTERM, after saving.
        KeyboardInterrupt: on a second SIGINT.
    """
    given = FitOptions(student, out, **options)
    if config is None:
        values = {field.name: getattr(given, field.name) for field in fields(given)}
        config = describe({"student": student, "data": data, **values})
    config = {name: value for name, value in config.items() if name != "resume"}
    folder = RunFolder(given.out)
    first = is_first_process(given.devices, given.num_nodes)
    console = Console(stderr=True, quiet=not (given.progress and first))
    with lock_folder(folder.path) if first else nullcontext():
        if (finished := folder.check(config, resume=given.resume)) is not None:
            if first:
                remove_partial(folder.path)
            console.print(f"{folder.path} is finished", soft_wrap=True)
            console.print(summary(finished), highlight=False, soft_wrap=True)
            return finished

        if given.save_every_steps is not None and not starts_within_epochs(data):
            raise ValueError(
                f"save_every_steps={given.save_every_steps} saves within epochs, and {type(data).__name__} has no "
                "start_batch by which to go on there: give it one, or leave save_every_steps out, which saves after "
                "every epoch"
            )
        # Before the models are built: a wrong name is found at once.
        loggers, callbacks = build_loggers(given.logger, folder.path), build_callbacks(given.callbacks)
        given = from_hub(given)
        training = build_training(given, data)
        check_monitored(callbacks, training.task)
        check_resumable(training)
        parameters = sum(parameter.numel() for parameter in training.student.parameters())
        score = training.task.headlines[0]
        facts = facts_of(data)
        card = training.card = make_card(given.student, facts, config)
        if given.sample_every is not None:
            callbacks.append(SamplePictures(folder.path / "samples", facts, given.sample_every))
        if first:
            folder.start(config)

        def end_epoch(training: Training) -> None:
            row = training.history.rows[-1]
            if row[score] > read_card(folder.best).get("metrics", {}).get(score, -1.0):
                save_student(training.result, folder.best, with_metrics(card, row, "best epoch"))
            training.history.write_csv(folder.metrics)
            if on_epoch is not None:
                on_epoch(row, score)

        def restore_folder() -> None:
            if not folder.config.is_file():
                rank_zero_warn(f"{folder.path} was removed while the training wrote into it: it is written again")
                folder.start(config)

        saver = Saver(
            folder.checkpoint,
            every_steps=given.save_every_steps,
            max_steps=given.max_steps,
            on_epoch=end_epoch,
            before_save=restore_folder,
            how_to_resume=f"Go on with: diffkd fit {shlex.quote(str(folder.config))} --resume"
            + trust_words(own_code(config)),
        )
        resumes = given.resume and folder.checkpoint.is_file()
        if given.resume and not resumes:
            console.print(f"nothing to resume in {folder.path}; starting at the beginning", soft_wrap=True)
        reset_peak()
        with silence_lightning(), keep_freed_memory(), divided_loaders(data, given.seed):
            trainer = Trainer(
                accelerator=given.accelerator,
                devices=given.devices,
                num_nodes=given.num_nodes,
                strategy=strategy_for(given.strategy, given.devices, given.num_nodes),
                precision=given.precision,  # type: ignore[arg-type]  # checked by the trainer
                max_epochs=given.epochs,
                gradient_clip_val=given.gradient_clip,
                accumulate_grad_batches=given.accumulate,
                logger=loggers,
                callbacks=[
                    StartReport(console),
                    TrainingProgress(console, notebook=given.progress == "notebook"),
                    *filter(None, [training.cached_teacher]),
                    *callbacks,
                    saver,
                ],
                plugins=[AtomicCheckpointIO(), *environments(given.devices, given.num_nodes)],
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
            except SystemExit as leaving:  # raised by the trainer on a second Ctrl-C
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
            "seed": given.seed,
            "command": shlex.join(sys.argv),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(),
            **({"pulls": training.pulls} if training.pulls else {}),
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
