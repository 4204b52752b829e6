"""A backbone that was distilled without labels goes on in each of the tasks."""

import json

import pytest
import torch

from diffkd import read_weights, save_student
from diffkd.models import load_backbone
from diffkd.tasks.data_facts import DataFacts
from diffkd.training.models import build_student

MODEL = "timm/test_resnet"


@pytest.fixture
def pretrained(tmp_path):
    save_student(load_backbone(MODEL), tmp_path / "student.safetensors")
    card = {"task": "representation", "model": MODEL, "num_classes": 0, "in_channels": 3, "classes": []}
    card |= {"mean": [0.5] * 3, "std": [0.2] * 3}
    (tmp_path / "student.json").write_text(json.dumps(card))
    return tmp_path


def facts(task):
    images = torch.rand(2, 3, 64, 64)
    size = {"min_size": (64,), "max_size": 64} if task == "detection" else {}
    example = list(images) if task == "detection" else images
    classes = tuple("abcde") if task != "representation" else ()
    return DataFacts(len(classes), 3, (64, 64), (0.5,) * 3, (0.2,) * 3, classes, example, task=task, **size)


@pytest.mark.filterwarnings("ignore:.*start from random weights")
@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("classification", MODEL),
        ("representation", MODEL),
        ("detection", f"fcos/{MODEL}"),
        ("segmentation", f"smp/unet/{MODEL}"),
    ],
)
def test_what_was_learned_is_taken(pretrained, task, name):
    notes = []
    student = build_student(name, facts(task), weights=str(pretrained), pretrained=False, seed=0, notes=notes)
    learned = read_weights(pretrained / "student.safetensors")
    convolutions = [value for key, value in learned.items() if key.endswith("conv1.weight")]
    own = list(student.state_dict().values())
    assert len(convolutions) > 2
    assert all(any(one.shape == value.shape and torch.equal(one, value) for one in own) for value in convolutions)
    said = " ".join(notes)
    assert ("tensors" in said) == (task != "representation")
    if task == "classification":
        assert "starts from random weights: fc.weight, fc.bias" in said
    elif task != "representation":
        assert said.startswith("the student's backbone: ")


def test_another_backbone_is_refused(pretrained):
    with pytest.raises(ValueError, match="does not fit the backbone"):
        build_student("fcos/resnet18", facts("detection"), weights=str(pretrained), pretrained=False, seed=0)
