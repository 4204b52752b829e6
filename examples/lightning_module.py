"""Distillation inside a `LightningModule` of one's own: `uv run python examples/lightning_module.py`."""

import argparse

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from packaged import EXAMPLE, images, student, task_loss, teacher
from torch.utils.data import DataLoader

from diffkd import Distiller, save_student


class Distilled(LightningModule):
    """Trains a student with a distiller; validation sees the student alone."""

    def __init__(self, distiller: Distiller, lr: float) -> None:
        super().__init__()
        self.distiller, self.lr = distiller, lr  # the teacher is in no checkpoint of Lightning's

    def training_step(self, batch, batch_index):
        """Log each loss by pair and term, and return the sum."""
        inputs, labels = batch
        output, losses = self.distiller(inputs)
        self.log_dict(losses)
        return task_loss(output, labels, losses)

    def validation_step(self, batch, batch_index):
        """Log the accuracy."""
        inputs, labels = batch
        scores = self.distiller.student(inputs)
        self.log("top1", (scores.argmax(1) == labels).float().mean(), prog_bar=True)
        self.log("val_loss", F.cross_entropy(scores, labels))

    def configure_optimizers(self):
        """Optimise the student and all that trains along with it."""
        optimizer = torch.optim.SGD(self.distiller.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(out: str, epochs: int = 5, **trainer) -> float:
    """Train, save the student, and return its accuracy."""
    seed_everything(0, verbose=False)
    train, test = images()
    model = Distilled(Distiller(student(), teacher(), example=EXAMPLE), lr=0.1)
    print(model.distiller)
    loop = Trainer(max_epochs=epochs, enable_checkpointing=False, logger=False, **trainer)
    loop.fit(model, DataLoader(train, 128, shuffle=True), DataLoader(test, 500))
    (measured,) = loop.validate(model, DataLoader(test, 500), verbose=False)
    save_student(model.distiller.student, out, {"accuracy": measured["top1"]})
    return measured["top1"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="student.safetensors")
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
