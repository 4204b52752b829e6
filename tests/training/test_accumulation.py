"""Steps of several batches."""

import csv
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from short_trainings import METHODS, arrays, same_weights, signal_self, train
from torch import nn

from diffkd.data import Augmentation
from diffkd.files.weights import read_weights
from diffkd.models import load_model
from diffkd.training.checkpointing import Interrupted
from diffkd.training.optimization import Schedule

PLAIN = {"augmentation": Augmentation()}


@pytest.fixture
def linear(tmp_path):
    """A file with a student whose images do not know of one another: no BatchNorm."""
    path = tmp_path / "linear.py"
    path.write_text(
        "from torch import nn\n"
        "def small(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * in_channels, num_classes))\n"
    )
    return str(path)


def steps_of(run):
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def student_of(run):
    return read_weights(run / "student.safetensors")


def test_small_batches_are_a_large_one(tmp_path, image_files, linear):
    options = {"precision": "64-true", "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "ema": 0.5}
    students, losses = [], []
    for name, batch_size, accumulate in (("large", 20, 1), ("small", 5, 4)):
        data = arrays(image_files, batch_size=batch_size, **PLAIN)
        losses.append(train(data, tmp_path / name, linear, accumulate=accumulate, **options)["last"]["train/task"])
        students.append(student_of(tmp_path / name))
        assert steps_of(tmp_path / name) == [3, 6, 9]
    torch.testing.assert_close(*students, rtol=1e-12, atol=1e-14)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_last_step_of_an_epoch_is_the_mean_of_its_batches_too(tmp_path, image_files, linear):
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1), "schedule": Schedule("constant"), "epochs": 1}
    train(arrays(image_files, **PLAIN), tmp_path / "run", linear, accumulate=4, precision="64-true", **options)
    torch.manual_seed(0)
    expected = load_model(f"{linear}:small", num_classes=6, in_channels=3).double()
    batches = list(arrays(image_files, **PLAIN).train_dataloader())
    for some in (batches[:4], batches[4:]):
        loss = sum(F.cross_entropy(expected(images.double()), labels) for images, labels, _ in some) / len(some)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
            parameter.data -= 0.1 * gradient
    torch.testing.assert_close(student_of(tmp_path / "run"), dict(expected.state_dict()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("trip", "every", "goes_on"), [(5, 1, 4), (3, 1, 0), (11, 2, 0), (10, None, 0)])
def test_killed_in_the_middle_of_a_step(tmp_path, image_files, model_file, trip, every, goes_on):
    options = {"method": METHODS["diffkd"], "ema": 0.8, "accumulate": 4, "save_every_steps": every}
    train(arrays(image_files), tmp_path / "whole", model_file, **options)
    with pytest.raises(ConnectionError):
        train(arrays(image_files, trip), tmp_path / "killed", model_file, **options)
    seen = []
    data = arrays(image_files, 0, lambda: seen.append(data.start_batch))
    train(data, tmp_path / "killed", model_file, resume=True, **options)
    assert seen == [goes_on]
    assert same_weights(tmp_path / "whole" / "student.safetensors", tmp_path / "killed" / "student.safetensors")


def test_stopped_in_the_middle_of_a_step_it_finishes_the_step(tmp_path, image_files, model_file):
    options = {"method": METHODS["diffkd"], "accumulate": 4}
    train(arrays(image_files), tmp_path / "whole", model_file, **options)
    data = arrays(image_files, 7, signal_self(signal.SIGTERM))
    with pytest.raises(Interrupted, match="after step 3"):
        train(data, tmp_path / "stopped", model_file, **options)
    train(arrays(image_files), tmp_path / "stopped", model_file, resume=True, **options)
    assert same_weights(tmp_path / "whole" / "student.safetensors", tmp_path / "stopped" / "student.safetensors")


class Drawing(nn.Module):
    """A method that draws a number in every forward."""

    wants = frozenset({"logits"})
    drawn: list[float]

    def __init__(self, student, teacher, drawn):
        super().__init__()
        self.drawn = drawn

    def forward(self, student, teacher):
        if self.training and torch.is_grad_enabled():
            self.drawn.append(torch.rand(()).item())
        return {"square": (student - teacher).square().mean()}


def test_every_batch_of_a_step_draws_its_own_noise(tmp_path, image_files, model_file):
    drawn: list[float] = []
    train(arrays(image_files), tmp_path, model_file, method=partial(Drawing, drawn=drawn), accumulate=3, max_steps=3)
    assert len(drawn[-9:]) == len(set(drawn[-9:])) == 9
    assert steps_of(tmp_path)[-1] == 3


def test_no_batch_makes_no_step(tmp_path, image_files, model_file):
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        train(arrays(image_files), tmp_path / "run", model_file, accumulate=0)
