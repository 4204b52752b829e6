"""Runs of students that are lazy, wrapped or scripted can be measured, exported, and teach."""

import pytest
from short_trainings import arrays

from diffkd import KD
from diffkd.commands.evaluate import evaluate
from diffkd.commands.export import export
from diffkd.training.fit import fit

QUIET = {"progress": False, "accelerator": "cpu"}
MODELS = """
import torch
from torch import nn

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )

def lazy(num_classes):
    return nn.Sequential(
        nn.LazyConv2d(4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(num_classes)
    )

def parallel(num_classes): return nn.DataParallel(net(num_classes))
def compiled(num_classes): return torch.compile(net(num_classes), backend="eager")
def scripted(num_classes): return torch.jit.script(net(num_classes))
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lazy", "parallel", "compiled", "scripted"])
def test_its_run_is_readable(kind, tmp_path, image_files):
    (tmp_path / "mine.py").write_text(MODELS)
    name, run = f"{tmp_path}/mine.py:{kind}", tmp_path / kind
    result = fit(name, arrays(image_files), run, epochs=1, **QUIET)
    assert evaluate(str(run), model=name, data=arrays(image_files), **QUIET)["top1"] == result["last"]["top1"]
    export(str(run), tmp_path / "student.safetensors")

    def learn(teacher):
        options = {"teacher": teacher, "teacher_weights": str(run), "method": KD, "epochs": 1, "max_steps": 1}
        fit(f"{tmp_path}/mine.py:net", arrays(image_files), tmp_path / "taught", **options, **QUIET)

    if kind == "scripted":
        with pytest.raises(ValueError, match=r"teacher is a program of torch\.jit\.script"):
            learn(name)
        learn(f"{tmp_path}/mine.py:net")
    else:
        learn(name)
