"""A data module of one's own, with plain loaders of PyTorch: stopped and resumed, and in two processes."""

import json
import signal

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from short_trainings import fail, same_weights, signal_self, train
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)
from two_processes import run_in_two

from diffkd.models import load_model
from diffkd.training.checkpointing import Interrupted, read_checkpoint
from diffkd.training.plain_loaders import divide


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


def parts(make, train, epoch=0):
    """The indices that three processes get in an epoch."""
    loaders = [make() for _ in range(3)]
    for rank, loader in enumerate(loaders):
        divide(loader, rank=rank, world_size=3, train=train, seed=5, epoch=epoch)
    assert [len(loader) for loader in loaders] == [len(list(loader)) for loader in loaders]
    return [[int(index) for batch in loader for index in batch] for loader in loaders]


@pytest.mark.parametrize("shuffle", [False, True])
def test_loaders_of_pytorch_are_divided(shuffle):
    def make():
        return DataLoader(range(11), batch_size=2, shuffle=shuffle)

    training = parts(make, train=True)
    assert [len(part) for part in training] == [4, 4, 4]
    assert sorted({index for part in training for index in part}) == list(range(11))
    assert (parts(make, train=True, epoch=1) != training) == shuffle
    evaluation = parts(make, train=False)
    assert sorted(index for part in evaluation for index in part) == list(range(11))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(11))


def test_what_divides_itself_is_left_alone():
    own = DistributedSampler(range(11), num_replicas=3, rank=1)
    for loader in (DataLoader(range(11), sampler=own), DataLoader(Stream(), batch_size=2)):
        before = loader.batch_sampler.sampler
        divide(loader, rank=0, world_size=3, train=True)
        assert loader.batch_sampler.sampler is before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * 11, 11), "batch_size": 2}, "WeightedRandomSampler"),
        ({"sampler": RandomSampler(range(11), num_samples=5), "batch_size": 2}, "RandomSampler"),
        ({"sampler": SequentialSampler(range(11)), "batch_size": None}, "SequentialSampler with batch_size=None"),
    ],
)
def test_what_cannot_be_divided_is_refused(options, named):
    with pytest.raises(ValueError, match=rf"3 processes would take the same samples, .* {named} .* DistributedSampler"):
        divide(DataLoader(range(11), **options), rank=0, world_size=3, train=True)


class Noted(Mine):
    """Writes down which samples each process was given, and has an odd number of them to measure by."""

    def __init__(self, files, folder):
        super().__init__(files)
        self.folder = folder
        self.val = Subset(self.val, range(35))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        what = "train" if self.trainer.training else "val"
        with (self.folder / f"{what}-{self.trainer.global_rank}.txt").open("a") as file:
            file.writelines(f"{int(index)}\n" for index in batch[2])
        return batch


class Undivided(Mine):
    """A loader of one's own that gives every process the same."""

    def train_dataloader(self):
        return Skipping(self.train, 0)


def train_half(files, out, models, kind):
    data = Noted(files, out.parent) if kind is Noted else kind(files)
    train(data, out, models, devices=2, epochs=2)


def test_two_processes_have_parts_of_their_own(tmp_path, image_files, model_file):
    codes, said = run_in_two(tmp_path / "log", train_half, image_files, tmp_path / "run", model_file, Noted)
    assert codes == [0, 0], said[-3000:]

    def seen(what, rank):
        return [int(line) for line in (tmp_path / f"{what}-{rank}.txt").read_text().split()]

    for epoch in range(2):
        ours, theirs = (seen("train", rank)[30 * epoch : 30 * (epoch + 1)] for rank in (0, 1))
        assert sorted(ours + theirs) == list(range(60))
        assert ours != sorted(ours)
    assert seen("train", 0)[:30] != seen("train", 0)[30:]
    assert sorted(seen("val", 0)[-18:] + seen("val", 1)[-17:]) == list(range(35))

    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["last"]["step"] == 2 * 3
    weights = tmp_path / "run" / "student.safetensors"
    student = load_model(f"{model_file}:small", num_classes=6, in_channels=3, weights=weights).eval()
    held = Subset(Mine(image_files).val, range(35))
    hits = sum(int(student(image[None]).argmax()) == int(label) for image, label, _ in held)
    assert result["last"]["top1"] == pytest.approx(hits / 35)


def test_two_processes_of_the_same_batches_are_refused(tmp_path, image_files, model_file):
    codes, said = run_in_two(tmp_path / "log", train_half, image_files, tmp_path / "run", model_file, Undivided)
    assert all(codes), said[-3000:]
    assert "two of the 2 processes were given the same first batch (samples [0, 1, 2, 3]...)" in said
