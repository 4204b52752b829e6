"""What would make a training pointless or impossible, found out before it starts."""

import torch
from torch import nn

from diffkd.calling import evaluation_mode, run
from diffkd.ramp import Ramp
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.optimization import Schedule
from diffkd.tasks.task_of_data import padded_example


def check_classes(data: DataFacts) -> None:
    """Raise ValueError if there is a single class to tell apart: its probability is always 1, and teaches nothing."""
    if data.task != "detection" and data.num_classes < 2:
        raise ValueError(
            f"the data have {data.num_classes} class ({', '.join(data.classes)}), so that there is nothing to learn: "
            "give a second one, such as the background"
        )


def check_type(student: nn.Module, data: DataFacts, precision: str) -> None:
    """Raise ValueError if the student's weights are of another type than the images, and it cannot take those.

    Args:
        student: as it was built.
        data: whose images are float32.
        precision: of the training; one that is not "true" or "mixed" of a width is left to the trainer.
    """
    width, _, kind = str(precision).partition("-")
    types = {p.dtype for p in student.parameters() if p.is_floating_point()} - {torch.float32}
    if not types or (kind in ("", "true") and width != "32") or kind not in ("", "true", "mixed"):
        return  # whole models are converted, images with them
    lower = torch.bfloat16 if width == "bf16" else torch.float16
    try:
        with evaluation_mode(student), torch.no_grad(), torch.autocast("cpu", lower, enabled=kind == "mixed"):
            run(student, padded_example(data, student))
    except RuntimeError as error:
        names = {torch.float64: "64-true", torch.bfloat16: "bf16-true", torch.float16: "16-true"}
        mend = " or ".join(names[kind] for kind in names if kind in types) or "another"
        raise ValueError(
            f"the weights of student {type(student).__name__} are of {', '.join(sorted(map(str, types)))}, but with "
            f"--precision {precision} its images are of torch.float32: give --precision {mend}, or build it in float32"
        ) from error


def never_reached(schedule: Schedule, ramp: Ramp, epochs: int) -> list[str]:
    """Say what of a schedule and a ramp lies beyond the end of a training, as it does where a recipe is shortened."""
    found = []
    late = [mark for mark in schedule.milestones if mark >= epochs]
    if schedule.kind == "step" and late:
        found.append(f"the rate does not fall at schedule.milestones {late}: there are {epochs} epochs")
    if schedule.warmup_epochs >= epochs:
        found.append(f"the rate rises for schedule.warmup_epochs={schedule.warmup_epochs:g} epochs, of {epochs}")
    if ramp.start + ramp.warmup >= epochs:
        found.append(
            f"the method never counts in full: method_ramp.start={ramp.start:g} and method_ramp.warmup={ramp.warmup:g} "
            f"take all of the {epochs} epochs"
        )
    return found
