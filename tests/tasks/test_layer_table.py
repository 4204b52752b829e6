"""The printed layers of a model, and pairs of two."""

import pytest

from diffkd import FitNet
from diffkd.tasks.layer_table import layers


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_layers_of_a_model(capsys):
    layers("cifar/compact_resnet8", num_classes=10, in_channels=1, image_size=28)
    text = capsys.readouterr().out
    assert "images 1x28x28" in text
    (line,) = (line for line in text.splitlines() if " layer3 " in line)
    assert "32x4x4" in line
    (line,) = (line for line in text.splitlines() if " output " in line)
    assert " 10 " in line


def test_layers_that_cannot_be_distilled_say_so(capsys):
    layers("torchvision/resnet18", image_size=64)
    assert any("take" in line for line in capsys.readouterr().out.splitlines() if " bn1 " in line)


def test_pairs_of_two_models(capsys):
    layers("cifar/compact_resnet8", teacher="cifar/compact_resnet14")
    rows = [line for line in capsys.readouterr().out.splitlines() if "DiffKD" in line]
    assert [("layer3" in row, "output" in row) for row in rows] == [(True, False), (False, True)]
    layers("cifar/compact_resnet8", teacher="cifar/compact_resnet14", method=FitNet)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "FitNet" in line)
    assert "layer3" in row
