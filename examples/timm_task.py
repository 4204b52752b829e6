"""Distillation as a training task of timm, whose loop then trains it: `uv run python examples/timm_task.py`."""

import argparse

import torch
from packaged import EXAMPLE, images, student, task_loss, teacher
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task.task import TrainingTask
from timm.utils import random_seed, unwrap_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from diffkd import Distiller, save_student


class DistillerTask(TrainingTask):
    """timm trains the distiller and evaluates the student; the denoisers are state of the task, beside the student."""

    def __init__(self, distiller: Distiller, device: torch.device) -> None:
        super().__init__(device=device)
        self.trainable_module = distiller.to(device)

    def prepare_distributed(self, device_ids=None, **options):
        """Wrap what is trained: the teacher is no part of it."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **options)
        return self

    def get_eval_model(self, module=None, ema=False):
        """Return the student, or the average of it."""
        module = self.get_trainable_module(ema=ema) if module is None else module
        return None if module is None else unwrap_model(module).student

    def get_task_state(self, module=None, ema=False):
        """Return the denoisers, for checkpoints."""
        return unwrap_model(self.get_trainable_module(ema=ema)).methods.state_dict()

    def load_task_state(self, state, strict=True, module=None, ema=False):
        """Go on with the denoisers of a checkpoint."""
        unwrap_model(self.get_trainable_module(ema=ema)).methods.load_state_dict(state, strict=strict)

    def forward(self, input, target):
        """Return the loss, the student's logits, and each distillation loss by name."""
        output, losses = self.trainable_module(input)
        return {"loss": task_loss(output, target, losses), "output": output, **losses}


def main(out: str, epochs: int = 5, max_steps: int | None = None) -> float:
    """Train, save the average of the student, and return its accuracy."""
    random_seed(0)
    train, test = images()
    loader = DataLoader(train, 128, shuffle=True, drop_last=True)
    task = DistillerTask(Distiller(student(), teacher(), example=EXAMPLE), torch.device("cpu"))
    task.setup_ema(decay=0.99, use_warmup=True)
    optimizer = create_optimizer_v2(task, "sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = min(epochs * len(loader), max_steps or epochs * len(loader))
    schedule = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
    step = 0
    while step < steps:
        task.train()
        for inputs, labels in loader:
            if step == steps:
                break
            task(inputs, labels)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            task.update_ema(step=step)
            schedule.step_update(step)
    model, evaluator = task.get_eval_model(ema=True).eval(), task.create_evaluator()
    with torch.no_grad():
        for inputs, labels in DataLoader(test, 500):
            evaluator.update(model(inputs), labels)
    save_student(model, out)
    return evaluator.compute()["top1"] / 100


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="student.safetensors")
    parser.add_argument("--epochs", type=int, default=5)
    print(f"{main(**vars(parser.parse_args())):.2%} of the test images right")
