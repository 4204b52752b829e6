"""Images of several classes: binary cross entropy and mean average precision."""

import numpy as np
import pytest
import torch
from short_trainings import train
from sklearn.metrics import average_precision_score
from torch import nn

from diffkd import FitNet
from diffkd.data import Arrays, Augmentation, hold_out, mix
from diffkd.tasks.classification import Classification
from diffkd.tasks.data_facts import facts_of


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


@pytest.mark.parametrize("change", [{"labels": np.full((60, 3), 2)}, {"labels": np.zeros((60, 2), dtype=int)}])
def test_other_numbers_are_refused(files, change):
    with np.load(files["train"]) as arrays:
        np.savez(files["train"], **(dict(arrays) | change))
    with pytest.raises(ValueError, match="zeros and ones of 3 classes: give a column for each"):
        data_of(files)
