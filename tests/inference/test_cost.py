"""What a model costs: counts against arithmetic, times in turns, and what cannot be run."""

import json

import pytest
import torch
from torch import nn

from diffkd.commands import cli
from diffkd.commands.profile import profile
from diffkd.inference.cost import Subject, measure_costs, multiply_adds
from diffkd.reports.tables import cost_tables
from diffkd.tasks.data_facts import DataFacts


def facts(size=(8, 6)):
    return DataFacts(5, 3, size, (0.0,) * 3, (1.0,) * 3, tuple("abcde"), None)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


def test_multiply_adds_are_those_of_the_layers():
    assert multiply_adds(small(), torch.rand(1, 3, 8, 6)) == 8 * 6 * 4 * 3 * 9 + 4 * 5


def test_models_and_runtimes_take_turns(tmp_path):
    subjects = [Subject("student", "a", small(), facts()), Subject("teacher", "b", small(), facts())]
    runtimes = ("pytorch", "onnx", "onnx-int8")
    found = measure_costs(subjects, tmp_path, runtimes=runtimes, batch_sizes=[1, 3], threads=[1], rounds=3)
    json.dumps(found)
    cost = found["models"]["student"]
    assert cost["parameters"] == 4 * 3 * 9 + 4 + 5 * 4 + 5
    assert cost["files"][".safetensors"] > 4 * cost["parameters"]
    assert set(cost["files"]) == {".safetensors", ".onnx", ".onnx int8"}
    seen = [(one["model"], one["runtime"], one["batch"]) for one in found["timings"]]
    assert sorted(seen) == sorted((s, r, b) for s in ("student", "teacher") for r in runtimes for b in (1, 3))
    for one in found["timings"]:
        assert 0 < one["low"] <= one["median"] <= one["high"]
        assert one["images_per_second"] == pytest.approx(1000 * one["batch"] / one["median"])
        assert one["rounds"] == 3
    sizes, times = cost_tables(found).values()
    assert sizes[1][:4] == ["student", "a", "137", "5,204"]
    assert len(times) == 1 + len(seen)


class Decides(nn.Module):
    """Cannot be followed, since the pixels decide in Python."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, images):
        found = self.layer(images.mean((2, 3)))
        return found if float(found.sum()) > 0 else -found


def test_what_cannot_be_run_is_named_and_the_rest_is_measured(tmp_path):
    found = measure_costs(
        [Subject("student", "a", Decides(), facts())], tmp_path, runtimes=("pytorch", "onnx"), rounds=1
    )
    assert "cannot be exported" in found["models"]["student"]["missing"]["onnx"]
    assert {one["runtime"] for one in found["timings"]} == {"pytorch"}


def test_a_name_is_profiled_and_written(tmp_path, capsys):
    words = ["profile", "cifar/compact_resnet8", "--teacher=cifar/compact_resnet14", "--num_classes=10"]
    words += [
        "--runtimes",
        "pytorch",
        "--batch_sizes",
        "1",
        "--threads",
        "1",
        "--rounds=1",
        f"--out={tmp_path / 'c.json'}",
    ]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "teacher" in out
    assert "pytorch" in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["image_size"] == [3, 32, 32]
    models = found["models"]
    assert models["teacher"]["multiply_adds"] > models["student"]["multiply_adds"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/net"], "nowhere/net is no run, no file, and no model that can be built"),
        (["a.onnx"], "is a program already"),
        (["hub:small"], "a student of the Hub is hub:USER/NAME"),
        (
            ["cifar/compact_resnet8", f"--out={__file__}/p.json"],
            "test_cost.py is a file and no folder; give another --out",
        ),
        (["cifar/compact_resnet8", "--rounds=0"], "must be at least 1"),
        (["cifar/compact_resnet8", "--batch_sizes", "0"], "must be at least 1"),
        (["cifar/compact_resnet8", "--runtimes", "tensorrt"], "tensorrt"),
        (["cifar/compact_resnet8", "--image_size=[1,2,3]"], "is no height and width"),
    ],
)
def test_what_cannot_be_profiled_is_named(tmp_path, capsys, words, message):
    assert cli.main(["profile", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_run_keeps_its_profile(tmp_path):
    with pytest.raises(ValueError, match="is a folder; give a file"):
        profile("cifar/compact_resnet8", out=tmp_path, progress=False)
