"""Students found, exported and measured again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from short_trainings import METHODS, arrays, same_weights, signal_self, train
from torch import nn

from diffkd import DiffKD, read_weights, save_student
from diffkd.commands.evaluate import evaluate
from diffkd.commands.export import export
from diffkd.data import Arrays, DetectionScenes, SegmentationScenes
from diffkd.export.plain_student import facts_of_card
from diffkd.export.student_file import find_student, read_card
from diffkd.models import load_detector, load_model, load_segmenter
from diffkd.official import to_official_state
from diffkd.training.checkpointing import Interrupted
from diffkd.training.fit import fit

QUIET = {"progress": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_files):
    """A finished run whose card says everything, since its values are given as the command line gives them."""
    folder = tmp_path_factory.mktemp("run")
    data = {"class_path": "diffkd.data.Arrays", "init_args": {**image_files, "batch_size": 7}}
    result = fit(
        "cifar/compact_resnet8",
        Arrays(**image_files, batch_size=7),
        folder,
        epochs=2,
        ema=0.5,
        config={"data": data, "precision": "32-true"},
        **QUIET,
    )
    return folder, result


def test_a_run_is_measured_as_it_was(run, capsys):
    folder, result = run
    assert evaluate(str(folder), accelerator="cpu")["top1"] == result["last"]["top1"]
    assert evaluate(str(folder), which="best", **QUIET)["top1"] == result["best"]["top1"]
    measured = evaluate(str(folder / "student.safetensors"), **QUIET)
    assert measured == {name: result["last"][name] for name in ("top1", "top5", "loss")}
    assert (
        f"{100 * measured['top1']:.2f} %  (recorded {100 * measured['top1']:.2f} %, last epoch)"
        in capsys.readouterr().out
    )


def test_a_program_leaves_the_card_of_the_weights_beside_it(run, tmp_path):
    folder, _ = run
    weights = export(str(folder), tmp_path / "student.safetensors")
    card = read_card(weights)
    program = export(str(folder), tmp_path / "student.pt2", which="best", normalize=True)
    assert read_card(weights) == card
    assert read_card(program)["normalizes"] is True
    assert read_card(program)["which"] == "best epoch"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ([], "no card"),
        ({"num_classes": 10**12}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"in_channels": -1}, "in_channels"),
        ({"image_size": "evil"}, "image_size"),
        ({"mean": [0.5, float("nan")]}, "mean"),
        ({"mean": []}, "mean"),
        ({"std": [0.0]}, "std"),
        ({"classes": [["a"]]}, "classes"),
        ({"classes": "ab"}, "classes"),
        ({"detection": True}, "detection"),
        ({"detection": {"channels": 3}}, "detection"),
        ({"segmentation": "auxiliary"}, "segmentation"),
    ],
)
def test_a_card_of_other_kinds_of_values_is_refused_by_file_and_value(change, named, tmp_path):
    card = tmp_path / "student.json"
    content = {"model": "cifar/resnet20", "num_classes": 3, **change} if change else change
    card.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"student\.json.*{named}"):
        read_card(tmp_path / "student.safetensors")


@pytest.mark.parametrize(
    ("content", "others"),
    [
        ({"model": {"name": "resnet18"}, "data": {"class_path": 3}, "classes": 10, "lr": 0.1}, "model, classes, data"),
        ({"model": "resnet18", "data": "cifar10", "metrics": [0.9]}, "data, metrics"),
        ({"model": "cifar/resnet20", "num_classes": 3, "data": {"init_args": True}}, "data"),
    ],
)
def test_what_others_write_beside_their_weights_is_no_obstacle(content, others, tmp_path):
    """Settings and measurements under the weights' name, of which only what a card could hold is taken."""
    (tmp_path / "best.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.warns(UserWarning, match=rf"best\.json: left out, .*: {others}"):
        card = read_card(tmp_path / "best.pt")
    assert card == {name: value for name, value in content.items() if name not in others.split(", ")}


def test_a_card_may_lack_whatever_it_likes(tmp_path):
    """Students saved from code have cards of a few values, and those of runs have nulls."""
    card = {"model": "cifar/resnet20", "num_classes": 0, "mean": None, "data": None, "detection": None, "more": {}}
    (tmp_path / "student.json").write_text(json.dumps(card), encoding="utf-8")
    assert read_card(tmp_path / "student.safetensors") == card


def test_a_card_written_by_hand_may_give_one_side_of_a_square_and_numbers_for_names(tmp_path):
    (tmp_path / "student.json").write_text('{"image_size": 224, "classes": [1, "b"]}', encoding="utf-8")
    assert read_card(tmp_path / "student.safetensors") == {"image_size": [224, 224], "classes": ["1", "b"]}


@pytest.mark.parametrize(("name", "value"), [("min_size", "x"), ("min_size", [0]), ("max_size", 1.5)])
def test_a_detector_s_card_of_impossible_sizes_is_refused(name, value):
    card = {"task": "detection", "num_classes": 3, "in_channels": 3, "image_size": [64, 64]}
    assert facts_of_card(card, "a.pt2").max_size == 1333
    with pytest.raises(ValueError, match=rf"a\.pt2 .*{name}"):
        facts_of_card(card | {"data": {"init_args": {name: value}}}, "a.pt2")


def test_data_normalised_otherwise_give_the_same_accuracy(run, image_files):
    folder, result = run
    other = Arrays(**image_files, batch_size=7, mean=(0.9, 0.5, 0.1), std=(0.1, 0.2, 0.4))
    measured = evaluate(str(folder), data=other, **QUIET)
    assert measured["top1"] == result["last"]["top1"]
    assert measured["loss"] == pytest.approx(result["last"]["loss"], rel=1e-4)


def test_weights_without_a_card_need_the_model(run, image_files, tmp_path):
    folder, result = run
    weights = tmp_path / "naked.safetensors"
    weights.write_bytes((folder / "student.safetensors").read_bytes())
    data = Arrays(**image_files, batch_size=7)
    with pytest.raises(ValueError, match="--data"):
        evaluate(str(weights), **QUIET)
    with pytest.raises(ValueError, match="--model"):
        evaluate(str(weights), data=data, **QUIET)
    assert evaluate(str(weights), model="cifar/compact_resnet8", data=data, **QUIET)["top1"] == result["last"]["top1"]
    with pytest.raises(ValueError, match="does not fit"):
        evaluate(str(weights), model="cifar/compact_resnet14", data=data, **QUIET)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "os:system"},
        {"data": {"class_path": "os.system", "init_args": {"command": "touch owned"}}},
        {"data": {"class_path": "diffkd.data.os", "init_args": {}}},
        {"data": {"class_path": "diffkd.data.DeviceLoader", "init_args": {}}},
    ],
)
def test_a_card_cannot_name_code(run, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.safetensors").write_bytes((run[0] / "student.safetensors").read_bytes())
    (tmp_path / "s.json").write_text(json.dumps(read_card(run[0] / "student.safetensors") | change))
    with pytest.raises(ValueError, match="yourself"):
        evaluate("s.safetensors", **QUIET)
    assert not (tmp_path / "owned").exists()


def test_other_classes_are_refused(run, tmp_path):
    for name in ("train", "test"):
        np.savez(tmp_path / name, images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4) % 2)
    with pytest.raises(ValueError, match="6 classes and 3 channels, the data have 2 and 3"):
        evaluate(str(run[0]), data=Arrays(tmp_path / "train.npz", tmp_path / "test.npz"), **QUIET)


def test_classes_of_other_names_or_in_another_order_are_noticed(run, tmp_path):
    learned = read_card(find_student(str(run[0])))["classes"]

    def measured(names):
        path = tmp_path / "named.npz"
        np.savez(path, images=np.zeros((6, 8, 8, 3), np.uint8), labels=np.arange(6), classes=np.array(names))
        return evaluate(str(run[0]), data=Arrays(path, path), **QUIET)

    with pytest.raises(ValueError, match=rf"another order: class 0 is '{learned[0]}' there, '{learned[-1]}' here"):
        measured(learned[::-1])
    with pytest.warns(UserWarning, match=rf"otherwise than the data: class 5 is '{learned[5]}' there, 'other' here"):
        measured([*learned[:5], "other"])


def test_a_run_is_exported(run, tmp_path, capsys):
    out = export(str(run[0]), tmp_path / "plain.safetensors")
    assert same_weights(out, run[0] / "student.safetensors")
    assert read_card(out) == read_card(run[0] / "student.safetensors")
    best = export(str(run[0]), tmp_path / "best.safetensors", which="best")
    assert same_weights(best, run[0] / "best.safetensors")
    assert "tensors" in capsys.readouterr().out


def test_a_checkpoint_is_exported(run, tmp_path):
    out = export(str(run[0] / "checkpoints" / "last.ckpt"), tmp_path / "plain.safetensors")
    assert same_weights(out, run[0] / "student.safetensors")
    assert evaluate(str(out), **QUIET)["top1"] == run[1]["last"]["top1"]


def test_an_unfinished_run_is_exported(tmp_path, image_files, model_file):
    data = arrays(image_files, 8, signal_self(15))
    with pytest.raises(Interrupted):
        train(data, tmp_path / "run", model_file, method=METHODS["diffkd"])
    with pytest.raises(FileNotFoundError, match="resume it first"):
        find_student(tmp_path / "run")
    out = export(str(tmp_path / "run"), tmp_path / "plain.safetensors")
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    weights = read_weights(out)
    assert torch.equal(weights["4.bias"], content["state_dict"]["model.student.4.bias"])
    card = read_card(out)  # these weights are of mid-epoch, and nobody has measured them
    assert (card["which"], card["epoch"], card["metrics"]) == ("step 9", None, {})
    best = export(str(tmp_path / "run"), tmp_path / "best.safetensors", which="best")
    assert same_weights(best, tmp_path / "run" / "best.safetensors")
    assert not same_weights(best, out)
    assert (read_card(best)["which"], read_card(best)["epoch"]) == ("best epoch", 1)


def test_the_best_epoch_of_a_run_without_one_is_missing(tmp_path, image_files, model_file):
    with pytest.raises(Interrupted):
        train(arrays(image_files, 2, signal_self(15)), tmp_path / "run", model_file)
    with pytest.raises(FileNotFoundError, match=r"holds no best\.safetensors: resume it first"):
        export(str(tmp_path / "run"), tmp_path / "best.safetensors", which="best")


def test_a_checkpoint_of_the_authors_is_exported(tmp_path):
    student = load_model("cifar/compact_resnet8", num_classes=5)
    state = {f"module.{name}": value for name, value in student.state_dict().items()}
    state |= {f"module._diff.layer3.{name}": value for name, value in to_official_state(DiffKD(32, 64)).items()}
    torch.save({"model": state}, tmp_path / "theirs.pth")
    out = export(str(tmp_path / "theirs.pth"), tmp_path / "plain.safetensors")
    assert read_weights(out).keys() == student.state_dict().keys()


def test_names_of_a_student_are_exported_as_they_are(tmp_path):
    student = nn.ModuleDict({"module": nn.Linear(2, 3)})
    student["module"].add_module("_align", nn.Linear(1, 1))
    saved = save_student(student, tmp_path / "student.safetensors")
    out = export(str(saved), tmp_path / "again.safetensors")
    assert read_weights(out, as_saved=True).keys() == student.state_dict().keys()
    torch.save({"_align.weight": torch.ones(1), "fc.weight": torch.ones(1)}, tmp_path / "foreign.pt")
    out = export(str(tmp_path / "foreign.pt"), tmp_path / "foreign.safetensors")
    assert sorted(read_weights(out)) == ["_align.weight", "fc.weight"]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_student(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no finished run"):
        find_student(tmp_path)
    with pytest.raises(ValueError, match=r"\.safetensors"):
        export("anything", tmp_path / "student.pt")


def test_a_program_is_no_file_of_weights(tmp_path):
    (tmp_path / "student.onnx").write_bytes(b"graph")
    with pytest.raises(ValueError, match=r"student\.onnx is a program, not weights; give the run"):
        find_student(tmp_path / "student.onnx")


def test_a_damaged_card_is_named(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors")
    assert read_card(tmp_path / "a.safetensors") == {}
    for content in ("{", "[]"):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_card(tmp_path / "a.safetensors")


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_averaged_students_of_dense_tasks_have_their_own_entries_alone(tmp_path, task):
    scenes, load, kind = {
        "detection": (DetectionScenes, load_detector, "tiny_fcos"),
        "segmentation": (SegmentationScenes, load_segmenter, "coarse"),
    }[task]
    name = f"{Path(__file__).parents[1] / 'program_models.py'}:{kind}"
    data = scenes(train_count=4, val_count=2, size=(32, 32), classes=(0, 1), batch_size=2)
    fit(name, data, tmp_path / "run", epochs=1, ema=0.5, **QUIET)
    for source in ("run", "run/checkpoints/last.ckpt"):
        out = export(str(tmp_path / source), tmp_path / "plain.safetensors")
        assert same_weights(out, tmp_path / "run" / "student.safetensors")
        assert read_card(out)["task"] == task
        model = load(name, num_classes=data.num_classes, weights=out)
        assert read_weights(out).keys() == model.state_dict().keys()
