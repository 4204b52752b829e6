"""Distillation with Accelerate, on any number of processes: `uv run accelerate launch examples/accelerate_loop.py`."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from packaged import EXAMPLE, accuracy, images, student, task_loss, teacher
from torch.utils.data import DataLoader

from diffkd import Distiller, save_student


def main(out: str, epochs: int = 5, max_steps: int | None = None) -> float:
    """Train, save the student, and return its accuracy."""
    set_seed(0)
    accelerator = Accelerator()
    train, test = images()
    loader = DataLoader(train, 128, shuffle=True, drop_last=True)

    distiller = Distiller(student(), teacher(), example=EXAMPLE)
    accelerator.print(distiller)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = min(epochs * len(loader), max_steps or epochs * len(loader))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    # The whole distiller is wrapped, so that the processes agree on the denoisers too; the teacher moves along.
    distiller, optimizer, loader, schedule = accelerator.prepare(distiller, optimizer, loader, schedule)

    step = 0
    while step < steps // accelerator.num_processes:
        distiller.train()
        for inputs, labels in loader:
            if step == steps // accelerator.num_processes:
                break
            output, losses = distiller(inputs)
            accelerator.backward(task_loss(output, labels, losses))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
    trained = accelerator.unwrap_model(distiller).student
    right = accuracy(trained.cpu(), test)
    if accelerator.is_main_process:
        save_student(trained, out, {"accuracy": right})
    accelerator.print(f"{right:.2%} of the test images right")
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="student.safetensors")
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
