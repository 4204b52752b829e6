"""Trainings that would be pointless or impossible are refused before they start."""

from functools import partial

import numpy as np
import pytest
from short_trainings import arrays, built, train

from diffkd import DiffKD
from diffkd.distill.ramp import Ramp
from diffkd.training.optimization import Schedule
from diffkd.training.start_checks import never_reached

WIDE = """
import torch
from tiny_models import large, small as plain

def small(num_classes, in_channels):
    return plain(num_classes, in_channels).to(torch.{kind})

class Casting(torch.nn.Sequential):
    def forward(self, images):
        return super().forward(images.to(self[0].weight.dtype)).float()

def casting(num_classes, in_channels):
    torch.manual_seed(0)
    net = Casting(torch.nn.Conv2d(in_channels, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, num_classes))
    return net.to(torch.{kind})
"""


@pytest.mark.parametrize(
    ("kind", "precision", "mend"),
    [
        ("float64", "32-true", "64-true"),
        ("float64", "bf16-mixed", "64-true"),
        ("bfloat16", "32-true", "bf16-true"),
        ("float16", "32-true", "16-true"),
    ],
)
def test_a_student_of_another_type_than_its_images(tmp_path, image_files, kind, precision, mend):
    file = tmp_path / "models.py"
    file.write_text(WIDE.format(kind=kind))
    message = (
        f"weights of student Sequential are of torch.{kind}, .* images are of torch.float32: give --precision {mend}"
    )
    with pytest.raises(ValueError, match=message):
        built(f"{file}:small", arrays(image_files), precision=precision, accelerator="cpu")
    built(f"{file}:casting", arrays(image_files), precision=precision, accelerator="cpu")


@pytest.mark.filterwarnings("ignore:.*precision=64-true:UserWarning")
def test_what_the_message_says_helps(tmp_path, image_files):
    file = tmp_path / "models.py"
    file.write_text(WIDE.format(kind="float64"))
    method = partial(DiffKD, ae_channels=6)
    result = train(arrays(image_files), tmp_path / "run", str(file), method=method, precision="64-true", epochs=1)
    assert np.isfinite(result["last"]["train/0/kd"])


def test_a_single_class_teaches_nothing(tmp_path, model_file):
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", images=images, labels=np.zeros(4, dtype=np.int64))
    files = dict.fromkeys(("train", "test"), str(tmp_path / "one.npz"))
    with pytest.raises(ValueError, match=r"the data have 1 class \(0\), so that there is nothing to learn: give"):
        built(f"{model_file}:small", arrays(files), accelerator="cpu")


def test_what_a_shortened_training_does_not_reach_is_said():
    steps, ramp = Schedule("step", milestones=[20, 150, 180], warmup_epochs=5), Ramp(start=1, warmup=20)
    assert never_reached(steps, ramp, 240) == []
    falls, counts = never_reached(steps, ramp, 21)
    assert "does not fall at schedule.milestones [150, 180]: there are 21 epochs" in falls
    assert "never counts in full: method_ramp.start=1 and method_ramp.warmup=20" in counts
    assert never_reached(Schedule(warmup_epochs=5), Ramp(), 5) == [
        "the rate rises for schedule.warmup_epochs=5 epochs, of 5"
    ]
