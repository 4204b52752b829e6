"""A training loop of one's own, with DiffKD added in two lines: the packaged teacher teaches a small student.

Run it with `uv run python examples/own_loop.py`; it takes about a minute on a CPU.
"""

import argparse
from importlib.resources import files

import torch
import torch.nn.functional as F

from diffkd import Distiller, save_student
from diffkd.data import FashionSubset
from diffkd.models import load_model


def main(epochs: int, out: str) -> float:
    """Train for so many epochs, save the student, and return its accuracy."""
    torch.manual_seed(0)
    data = FashionSubset(batch_size=128)
    weights = str(files("diffkd") / "assets" / "fashion_mnist" / "teacher.safetensors")
    teacher = load_model("cifar/compact_resnet14", num_classes=10, in_channels=1, weights=weights)
    student = load_model("cifar/compact_resnet8", num_classes=10, in_channels=1)

    distiller = Distiller(student, teacher, example=data.example())  # the first line
    print(distiller)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    train, test = data.train_dataloader(), data.val_dataloader()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * len(train))

    accuracy = 0.0
    for epoch in range(epochs):
        distiller.train()
        train.set_epoch(epoch)
        for images, labels, _ in train:
            output, losses = distiller(images)
            loss = F.cross_entropy(output, labels) + sum(losses.values())  # the second
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        student.eval()
        with torch.no_grad():
            hits = sum(int((student(images).argmax(1) == labels).sum()) for images, labels, _ in test)
        accuracy = hits / 2000
        print(f"epoch {epoch + 1}: {accuracy:.2%} of the test images right")
    save_student(student, out, {"accuracy": accuracy})
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", default="student.safetensors")
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.out)
