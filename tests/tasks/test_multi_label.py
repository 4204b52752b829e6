"""Images of several classes: binary cross entropy and mean average precision."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from short_trainings import train
from sklearn.metrics import average_precision_score
from torch import nn

from diffkd import FitNet
from diffkd.commands import cli
from diffkd.commands.report import report
from diffkd.data import Arrays, Augmentation, hold_out, mix
from diffkd.models import load_model
from diffkd.reports.mistakes import find_mistakes
from diffkd.tasks.classification import Classification
from diffkd.tasks.data_facts import DataFacts, facts_of


@pytest.fixture
def files(tmp_path):
    draw = np.random.default_rng(0)
    found = {}
    for name, count in (("train", 60), ("test", 36)):
        labels = draw.integers(0, 2, (count, 3))
        images = (60 * labels[:, None, None, :] + draw.integers(0, 60, (count, 8, 8, 3))).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels, classes=np.array(["red", "green", "blue"]))
        found[name] = str(tmp_path / f"{name}.npz")
    return found


def data_of(files, **options):
    return Arrays(files["train"], files["test"], batch_size=10, **options)


def test_average_precision_as_in_scikit_learn():
    torch.manual_seed(2)
    task = Classification(4, multi_label=True)
    meter = task.meter(torch.device("cpu"))
    scores, labels = torch.randn(50, 4), torch.randint(0, 2, (50, 4))
    labels[:, 3] = 0  # a class that no image has
    model = nn.Identity()
    for part in (slice(0, 20), slice(20, 50)):
        meter.update(model, (scores[part], labels[part], torch.arange(50)[part]))
    row = meter.compute()
    assert set(row) == set(task.metrics)
    expected = [average_precision_score(labels[:, k], scores[:, k]) for k in range(3)]
    assert row["map"] == pytest.approx(np.mean(expected))
    probabilities = scores.double().sigmoid()
    loss = -torch.where(labels == 1, probabilities, 1 - probabilities).log().mean()
    assert row["loss"] == pytest.approx(float(loss))


def test_the_loss_is_binary_for_each_class():
    task = Classification(3, label_smoothing=0.2, multi_label=True)
    labels, scores = torch.tensor([[1, 0, 1], [0, 0, 0]]), torch.randn(2, 3, dtype=torch.float64)
    step = task.step((torch.randn(2, 3, 8, 8), labels, torch.arange(2)), 0)
    targets = torch.where(labels == 1, 0.9, 0.1).double()
    p = scores.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    torch.testing.assert_close(task.losses(scores, step)["task"], expected)


def test_several_labels_mix():
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(0, 2, (6, 4))
    mixed, targets = mix(images, labels, 4, mixup=0.5, seed=3)
    assert targets.shape == (6, 4)
    assert not torch.equal(mixed, images)
    assert targets.sum() == pytest.approx(float(labels.sum()))


def test_a_student_learns_several_labels(files, tmp_path, model_file):
    data = data_of(files, augmentation=Augmentation(flip=True))
    facts = facts_of(data)
    assert (facts.multi_label, facts.num_classes, facts.classes) == (True, 3, ("red", "green", "blue"))
    result = train(data, tmp_path / "out", model_file, method=FitNet, epochs=4)
    assert result["score"] == "map"
    assert result["last"]["map"] > 0.6
    assert len(list(hold_out(data, 0.3).val_dataloader())) == 2


@pytest.fixture
def run(files, tmp_path, model_file):
    """A student of several labels, trained on the command line."""
    words = ["fit", f"--student={model_file}:small", "--data=Arrays", f"--data.train={files['train']}"]
    words += [f"--data.test={files['test']}", "--data.batch_size=10", "--epochs=4", f"--out={tmp_path / 'run'}"]
    assert cli.main([*words, "--accelerator=cpu", "--progress=false", "--sample_every=4"]) == 0
    return tmp_path / "run"


def test_files_are_predicted_with_a_score_for_each_class(run, files, tmp_path, model_file, capsys):
    with np.load(files["test"]) as arrays:
        for index, image in enumerate(arrays["images"][:8]):
            Image.fromarray(image).save(tmp_path / f"{index}.png")
    data = data_of(files)
    model = load_model(f"{model_file}:small", num_classes=3, in_channels=3, weights=run / "student.safetensors").eval()
    with torch.no_grad():
        expected = model(next(iter(data.val_dataloader()))[0][:8]).sigmoid()
    words = ["predict", str(run), str(tmp_path / "*.png"), f"--trust={model_file}", "--accelerator=cpu"]
    assert cli.main([*words, f"--out={tmp_path / 'json'}", "--threshold=0.4", "--pictures=true"]) == 0
    images = json.loads((tmp_path / "json" / "predictions.json").read_text())["images"]
    for image, scores in zip(images, expected, strict=True):
        assert {one["label"]: one["score"] for one in image["top"]} == pytest.approx(
            dict(enumerate(scores.tolist())), abs=1e-4
        )
        assert {one["label"] for one in image["found"]} == set((scores >= 0.4).nonzero()[:, 0].tolist())
    assert cli.main([*words, f"--out={tmp_path / 'csv'}", "--threshold=0.4", "--format=csv"]) == 0
    rows = list(csv.DictReader((tmp_path / "csv" / "predictions.csv").read_text().splitlines()))
    assert [(row["file"], row["class"]) for row in rows] == [
        (image["file"], one["class"]) for image in images for one in image["found"]
    ]
    capsys.readouterr()
    assert cli.main([*words, f"--out={tmp_path / 'labels'}", "--pseudo_labels=true"]) == 1
    assert "an image may have several classes of this student: leave the option out" in capsys.readouterr().err
    assert not (tmp_path / "labels").exists()


def test_the_page_of_a_run_counts_what_is_found_of_each_class(run, model_file):
    pytest.importorskip("plotly")
    text = report(str(run), trust=[model_file], progress=False).read_text(encoding="utf-8")
    assert "Found and missed by class" in text
    assert "map:" in text
    assert (run / "samples" / "epoch-0004.png").is_file()


class Fixed(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, images):
        return self.output


def test_the_worst_images_are_those_of_the_largest_loss():
    logits = torch.tensor([[4.0, -4.0], [-9.0, -4.0], [1.0, 1.0]])
    batch = (torch.rand(3, 3, 8, 8), torch.tensor([[1, 0], [1, 0], [0, 1]]), torch.arange(3))
    facts = DataFacts(2, 3, (8, 8), (0.0,) * 3, (1.0,) * 3, ("cat", "dog"), None, multi_label=True)
    found = find_mistakes(Fixed(logits), facts, [batch])
    # Of the cats one is found and one missed, and an image without one is taken for one.
    assert found.confusion.tolist() == [[[0, 1], [1, 1]], [[2, 0], [0, 1]]]
    lines = [line for _, line in found.worst]
    assert lines[0].startswith("image 1: no class, is cat (loss 4.5")
    assert lines[1].startswith("image 2: cat 0.73, dog 0.73, is dog")


@pytest.mark.parametrize("change", [{"labels": np.full((60, 3), 2)}, {"labels": np.zeros((60, 2), dtype=int)}])
def test_other_numbers_are_refused(files, change):
    with np.load(files["train"]) as arrays:
        np.savez(files["train"], **(dict(arrays) | change))
    with pytest.raises(ValueError, match="zeros and ones of 3 classes: give a column for each"):
        data_of(files)
