"""A data module of one's own, with plain loaders of PyTorch: stopped and resumed."""

import signal

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from short_trainings import fail, same_weights, signal_self, train
from torch.utils.data import DataLoader, Dataset, Subset

from diffkd.training.checkpointing import Interrupted, read_checkpoint


class Pictures(Dataset):
    """The images of a file; calls something just before it hands out its sample number `trip`."""

    def __init__(self, file, trip=None, action=fail):
        content = np.load(file)
        self.images = torch.from_numpy(content["images"]).permute(0, 3, 1, 2) / 255
        self.labels = torch.from_numpy(content["labels"])
        self.trip, self.action, self.handed_out = trip, action, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if self.handed_out == self.trip:
            self.action()
        self.handed_out += 1
        return self.images[index], self.labels[index], index


class Mine(LightningDataModule):
    """As docs/data.md asks for: 6 batches of 10 an epoch."""

    num_classes, in_channels, image_size = 6, 3, (8, 8)
    mean, std, classes = (0.0,) * 3, (1.0,) * 3, tuple("abcdef")

    def __init__(self, files, trip=None, action=fail):
        super().__init__()
        self.train, self.val = Pictures(files["train"], trip, action), Pictures(files["test"])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=10, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=10)

    def example(self):
        return self.train.images[:2]


class Skipping:
    """A loader without shuffling that leaves out the first batches of its first epoch."""

    def __init__(self, data, start):
        self.data, self.start = data, start

    def __len__(self):
        return len(self.data) // 10

    def __iter__(self):
        """A generator, as the trainer asks for an iterator twice and uses the second."""
        start, self.start = self.start, 0
        yield from DataLoader(Subset(self.data, range(start * 10, len(self.data))), batch_size=10)


class Resumable(Mine):
    start_batch = 0

    def train_dataloader(self):
        return Skipping(self.train, self.start_batch)


@pytest.mark.parametrize(
    ("trip", "message", "steps"),
    [
        (75, r"step 8\. Mine has no start_batch .*last\.ckpt stays that of epoch 1 \(step 6\).* --resume", 6),
        (25, r"step 3\. Mine has no start_batch .* nothing is saved, and the run begins anew.* --resume", None),
        (115, r"step 12 and saved .*last\.ckpt", 12),
    ],
)
def test_stopped_within_an_epoch_it_goes_on_from_the_last_whole_one(
    tmp_path, image_files, model_file, trip, message, steps
):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(Interrupted, match=message):
        train(Mine(image_files, trip, signal_self(signal.SIGTERM)), tmp_path, model_file)
    assert (read_checkpoint(checkpoint)["global_step"] if checkpoint.exists() else None) == steps
    data = Mine(image_files)
    result = train(data, tmp_path, model_file, resume=True)
    assert (result["last"]["epoch"], result["last"]["step"]) == (3, 18)
    assert data.train.handed_out == 180 - 10 * (steps or 0)


def test_with_a_start_batch_it_goes_on_where_it_was(tmp_path, image_files, model_file):
    train(Resumable(image_files), tmp_path / "whole", model_file)
    with pytest.raises(Interrupted, match="step 8 and saved"):
        train(Resumable(image_files, 75, signal_self(signal.SIGTERM)), tmp_path / "stopped", model_file)
    data = Resumable(image_files)
    train(data, tmp_path / "stopped", model_file, resume=True)
    assert data.train.handed_out == 100
    assert same_weights(tmp_path / "whole" / "student.safetensors", tmp_path / "stopped" / "student.safetensors")


def test_saving_within_epochs_needs_a_start_batch(tmp_path, image_files, model_file):
    with pytest.raises(ValueError, match="save_every_steps=2 saves within epochs, and Mine has no start_batch"):
        train(Mine(image_files), tmp_path / "run", model_file, save_every_steps=2)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("config.yaml"))
    train(Resumable(image_files), tmp_path / "run", model_file, save_every_steps=2, epochs=1)
