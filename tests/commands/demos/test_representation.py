"""The demonstration without labels, on few images."""

import json

import pytest
import torch
from rich.console import Console

from diffkd.commands.compare import find_method
from diffkd.commands.demos.representation import METHODS, representation_demo
from diffkd.data import FashionSubset
from diffkd.files.fitting import load_weights
from diffkd.models import load_backbone


def test_the_demo(tmp_path):
    """Teacher, random and distilled student are in the table, and what was distilled is what is fine-tuned."""
    few = {"methods": ("cosine",), "labels": {2: (1, 8)}, "options": ["--data.per_class=20"]}
    rows = representation_demo(tmp_path, 1, 1, 1, Console(quiet=True), **few)
    assert [row.method for row in rows] == ["cosine"]
    table = json.loads((tmp_path / "representation.json").read_text())
    assert list(table) == ["teacher", "random", "cosine"]
    assert table["teacher"]["knn"]["mean"] > 60
    last = json.loads((tmp_path / "pretrained/cosine/seed-0/result.json").read_text())["last"]
    assert table["cosine"]["linear"]["mean"] == pytest.approx(100 * last["linear"])
    assert {"knn", "linear", "2 labels a class"} == set(table["random"])
    load_weights(
        load_backbone("cifar/compact_resnet8", in_channels=1), tmp_path / "pretrained/cosine/seed-0/student.safetensors"
    )
    log = (tmp_path / "labels-2/cosine/seed-0.log").read_text()
    assert "start from random weights" in log


def test_its_presets_exist_and_are_those_of_the_task():
    for method in METHODS:
        assert find_method(method).is_file()
    recipe = "representation/demo"
    assert find_method("diffkd-direct", recipe) == find_method("representation/diffkd-direct")
    assert find_method("cosine", recipe) == find_method("cosine")


def test_a_part_of_each_class_is_drawn():
    first, again = (FashionSubset(per_class=3, seed=1)._loaders.train for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert first.labels.bincount().tolist() == [3] * 10
    assert not torch.equal(FashionSubset(per_class=3, seed=2)._loaders.train.images, first.images)
    with pytest.raises(ValueError, match="per_class=801 is no number of images of each class: give 1 to 800"):
        FashionSubset(per_class=801)
