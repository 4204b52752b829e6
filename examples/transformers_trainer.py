"""Distillation with the `Trainer` of transformers, unchanged: `uv run python examples/transformers_trainer.py`.

The student is a ResNet of transformers, the teacher one of this package: any two models will do.
"""

import argparse

import torch
import torch.nn.functional as F
from packaged import EXAMPLE, images, task_loss, teacher
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from diffkd import Distiller


class Distilled(nn.Module):
    """What the `Trainer` wants of a model: a loss and logits, from images and labels."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss and the logits; in evaluation those of the student alone."""
        if not self.training:
            logits = self.distiller.student(pixel_values).logits
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}
        output, losses = self.distiller(pixel_values)
        return {"loss": task_loss(output.logits, labels, losses), "logits": output.logits}


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return a batch by the names of the arguments."""
    pixels, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": torch.stack(labels)}


def main(out: str, epochs: int = 5, max_steps: int = -1) -> float:
    """Train, save the student as transformers does, and return its accuracy."""
    set_seed(0)
    train, test = images()
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
    )
    student = ResNetForImageClassification(config)
    distiller = Distiller(student, teacher(), example=EXAMPLE)
    print(distiller)
    arguments = TrainingArguments(
        out,
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=128,
        per_device_eval_batch_size=500,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(Distilled(distiller), arguments, collate, train, test, compute_metrics=_accuracy)
    trainer.train()
    student.save_pretrained(out)  # a plain model of transformers
    return trainer.evaluate()["eval_accuracy"]


def _accuracy(predicted) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="student")
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
