"""The printed layers of a model, and pairs of two."""

import pytest

from diffkd import FitNet
from diffkd.commands.layers import layers


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


def test_pyramids_of_detectors(capsys):
    layers("retinanet/timm/test_resnet", teacher="fcos/resnet18", task="detection", image_size=64)
    rows = [line for line in capsys.readouterr().out.splitlines() if "DiffKD" in line]
    assert [row.split()[0] for row in rows] == [
        "backbone[0]",
        "backbone[1]",
        "backbone[2]",
        "backbone[p6]",
        "backbone[p7]",
    ]


def test_class_maps_of_segmenters(capsys):
    layers("smp/fpn/resnet18", teacher="torchvision/lraspp_mobilenet_v3_large", task="segmentation", image_size=72)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "DiffKD" in line)
    assert "segmentation_head.0" in row
    assert "20x" in row


def test_names_are_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    layers("retinanet/timm/test_resnet", teacher="fcos/resnet18", task="detection", image_size=64)
    text = capsys.readouterr().out
    assert text.count("backbone[p6]") == 3
    assert "…" not in text
    layers("torchvision/densenet121", image_size=64)
    assert "…" not in capsys.readouterr().out
