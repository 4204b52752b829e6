"""`diffkd inspect` shows what is in a file, without running any of it."""

import argparse
import json

import pytest
import torch
from short_trainings import arrays, train

from diffkd.commands import cli
from diffkd.commands.inspect_file import inspect
from diffkd.models import load_model

NAME = "cifar/compact_resnet8"


@pytest.fixture
def shown(capsys):
    def show(path, **options):
        inspect(str(path), **options)
        return capsys.readouterr().out

    return show


def test_weights(shown, tmp_path):
    state = load_model(NAME, num_classes=3).state_dict()
    content = {"state_dict": {f"model.{name}": value for name, value in state.items()}, "args": argparse.Namespace()}
    torch.save(content, tmp_path / "a.ckpt")
    said = shown(tmp_path / "a.ckpt")
    assert f"weights, {len(state)} tensors" in said
    assert f"'state_dict': {len(state)} tensors, model.conv1.weight" in said
    assert "not read: args (argparse.Namespace)" in said
    assert "taken would be those under 'state_dict'" in said
    fitted = shown(tmp_path / "a.ckpt", model=NAME, num_classes=3)
    assert f"into {NAME}: {len(state)} of {len(state)} entries; under 'state_dict.model'" in fitted
    assert "of another shape: fc.weight, fc.bias" in shown(tmp_path / "a.ckpt", model=NAME, num_classes=4)


def test_several_weights(shown, tmp_path):
    state = load_model(NAME, num_classes=3).state_dict()
    torch.save({"student": state, "teacher": {name: value + 1 for name, value in state.items()}}, tmp_path / "a.pt")
    assert "depends on the model: holds several state dicts: give one of their keys, 'student', 'teacher'" in shown(
        tmp_path / "a.pt"
    )
    assert "under 'teacher'" in shown(tmp_path / "a.pt", model=NAME, num_classes=3, key="teacher")


def test_runs(shown, tmp_path, model_file, image_files):
    train(arrays(image_files), tmp_path / "run", model_file, epochs=1, config={"student": "mine", "epochs": 1})
    said = shown(tmp_path / "run")
    assert "a run, finished" in said
    assert "student: mine" in said
    assert "last epoch (1): top1" in said
    assert "student.safetensors" in said
    assert "card:" in shown(tmp_path / "run" / "student.safetensors")


def test_annotations_of_coco(shown, tmp_path):
    content = {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 2, 2]}, {"image_id": 1, "category_id": 7}],
        "categories": [{"id": 7, "name": "cat\x1b[31m"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    said = shown(tmp_path / "train.json")
    assert "COCO, 2 images, 2 annotations, 1 with a box" in said
    assert "cat?[31m 2" in said
    assert "1 images have no annotation" in said
    assert "--data diffkd.data.CocoDetection" in said


def test_annotations_of_voc(shown, tmp_path):
    (tmp_path / "a.xml").write_text(
        "<annotation><filename>a.jpg</filename><size><width>40</width><height>20</height></size><object><name>cat</name>"
        "<difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object>"
        "</annotation>"
    )
    said = shown(tmp_path / "a.xml")
    assert "VOC, image a.jpg, 40x20 pixels, 1 objects" in said
    assert "cat, 1 2 3 4, difficult" in said


def test_data_of_yolo(shown, tmp_path):
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "images/train/a.png").touch()
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: images/train\nval: images/val\nkpt_shape: [2, 3]\n")
    for given in (tmp_path, tmp_path / "data.yaml"):
        said = shown(given)
        assert "YOLO, 2 classes: cat, dog" in said
        assert "1 images, 0 label files" in said
        assert "val: images/val, which is not there" in said
        assert "keypoints [2, 3]" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.pt", None, "no file or folder"),
        ("a.pt", b"", "is empty"),
        ("a.json", b"[" * 100_000, "is no JSON"),
        ("a.json", b"[]", "no annotation file of COCO"),
        ("a.xml", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "entities"),
        ("a.xml", b"<html></html>", "no annotation of VOC"),
        ("data.yaml", b"a: 1", "no data.yaml of YOLO"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert cli.main(["inspect", str(tmp_path / name)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
