"""Trainings without labels: resumed, cached, measured by a probe, and refused where they cannot work."""

import json
import signal

import pytest
import torch
from short_trainings import arrays, same_weights, signal_self, train
from two_processes import run_in_two

from diffkd import KD, RKD, Balance, DiffKD, FitNet, read_weights
from diffkd.commands import cli
from diffkd.commands.evaluate import evaluate
from diffkd.data import Augmentation
from diffkd.files.history import read_csv
from diffkd.training.checkpointing import Interrupted
from diffkd.training.fit import fit


def unlabelled(image_files, *args, **options):
    return arrays(image_files, *args, labels=False, **options)


def rows(folder):
    return [
        {name: value for name, value in row.items() if name != "seconds"} for row in read_csv(folder / "metrics.csv")
    ]


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, image_files, model_file):
    options = {"method": DiffKD, "ema": 0.8}
    train(unlabelled(image_files), tmp_path / "whole", model_file, **options)
    with pytest.raises(Interrupted):
        train(unlabelled(image_files, 9, signal_self(signal.SIGTERM)), tmp_path / "stopped", model_file, **options)
    train(unlabelled(image_files), tmp_path / "stopped", model_file, resume=True, **options)
    assert same_weights(tmp_path / "whole/student.safetensors", tmp_path / "stopped/student.safetensors")
    assert rows(tmp_path / "whole") == rows(tmp_path / "stopped")
    last = rows(tmp_path / "whole")[-1]
    assert {"knn", "cka", "cosine", "teacher_knn", "linear", "teacher_linear", "knn_unaveraged"} <= last.keys()
    assert "linear" not in rows(tmp_path / "whole")[0]
    assert last["teacher_knn"] == rows(tmp_path / "whole")[0]["teacher_knn"]


def test_the_cached_teacher_gives_the_same_numbers(tmp_path, image_files, model_file):
    def run(name, **options):
        data = unlabelled(image_files, augmentation=Augmentation())
        options |= {"precision": "64-true", "teacher_cache_storage": "float32"}
        train(data, tmp_path / name, model_file, method=FitNet, epochs=2, **options)
        return rows(tmp_path / name)[-1]

    running = run("running")
    for name in ("filling", "full"):
        cached = run(name, teacher_cache=tmp_path / "cache")
        # The cache keeps float32, of float64 features: relative 6e-8 a number, some hundred of which are summed.
        assert cached == pytest.approx(running, rel=1e-4)


def test_the_student_is_a_backbone_that_can_be_measured_again(tmp_path, image_files, model_file):
    data = unlabelled(image_files)
    init = {"train": image_files["train"], "test": image_files["test"], "batch_size": 10, "labels": False}
    config = {"data": {"class_path": "diffkd.data.Arrays", "init_args": init}}
    result = train(data, tmp_path / "run", model_file, method=RKD, epochs=1, config=config)
    card = json.loads((tmp_path / "run" / "student.json").read_text())
    assert (card["task"], card["num_classes"], card["classes"]) == ("representation", 0, [])
    again = evaluate(str(tmp_path / "run"), model=f"{model_file}:small", accelerator="cpu", progress=False)
    assert again == {name: pytest.approx(result["last"][name], abs=1e-6) for name in ("knn", "linear")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": None}, "images without labels teach nothing by themselves: give --teacher"),
        ({"method": KD}, "KD learns from class scores, and representations have none: take DiffKD"),
        ({"method": FitNet, "balance": Balance(1.0)}, "a Balance follows the task's loss, .* give numbers"),
        ({"method": FitNet, "label_smoothing": 0.1}, "label_smoothing is for classification"),
    ],
)
def test_what_needs_labels_is_refused(tmp_path, image_files, model_file, options, message):
    with pytest.raises(ValueError, match=message):
        train(unlabelled(image_files), tmp_path, model_file, **options)


def test_models_without_anything_to_pair_are_refused(tmp_path, image_files):
    nets = tmp_path / "nets.py"
    nets.write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Whole(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale = nn.Parameter(torch.ones(1))\n"
        "    def forward(self, images):\n"
        "        return (self.scale * images)[None]\n"
        "def small(): return Whole()\n"
        "def large(): return Whole()\n"
    )
    with pytest.raises(ValueError, match="neither a vector nor a map for each image: let it return one"):
        fit(f"{nets}:small", unlabelled(image_files), tmp_path / "out", teacher=f"{nets}:large", method=FitNet)


def test_images_may_be_mixed(tmp_path, image_files, model_file):
    data = unlabelled(image_files, augmentation=Augmentation(mixup=0.5))
    assert train(data, tmp_path, model_file, method=FitNet, epochs=1)["last"]["train/embedding/kd"] > 0
    assert torch.is_tensor(data.example())


NETS = """
import torch
from torch import nn

def net(width, in_channels, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(in_channels, width, 3, 2, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def small(in_channels): return net(4, in_channels, 0)
def large(in_channels): return net(12, in_channels, 1)
"""


def train_half(data, out, nets):
    train(data, out, nets, method=FitNet, devices=2, epochs=2, precision="64-true")


def test_two_processes_train_and_measure_what_one_does(tmp_path, image_files):
    """Half of each batch on either, and nothing that is a process's own: statistics, or augmentation, of a batch."""
    nets = tmp_path / "nets.py"
    nets.write_text(NETS)
    whole, halves = (unlabelled(image_files, batch_size=size, augmentation=Augmentation()) for size in (10, 5))
    codes, said = run_in_two(tmp_path / "log", train_half, halves, tmp_path / "two", str(nets))
    assert codes == [0, 0], said
    train(whole, tmp_path / "one", str(nets), method=FitNet, epochs=2, precision="64-true")
    alone, together = (rows(tmp_path / name)[-1] for name in ("one", "two"))
    assert alone.keys() == together.keys()
    # Losses are means of 60 numbers in another order, in float64; measurements are made of embeddings in float32.
    assert together == pytest.approx(alone, rel=1e-5)
    alone, together = (read_weights(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_a_run_has_its_page_with_what_is_seen(tmp_path, image_files):
    pytest.importorskip("plotly")
    nets = tmp_path / "nets.py"
    nets.write_text(NETS)
    words = ["fit", f"--student={nets}:small", f"--teacher={nets}:large", "--method=diffkd.FitNet", "--data=Arrays"]
    words += [f"--data.{name}={file}" for name, file in image_files.items()]
    words += ["--data.labels=false", "--data.batch_size=20", "--epochs=1", f"--out={tmp_path / 'run'}"]
    assert cli.main([*words, "--accelerator=cpu", "--progress=false", f"--trust={nets}"]) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "What student and teacher see" in page
    assert "Worst images" not in page
