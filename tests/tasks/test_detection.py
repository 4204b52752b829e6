"""Object detection: the metric by hand and against its library, and whole trainings."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from short_trainings import same_weights, signal_self
from small_detectors import CLASSES, NAME, detector, facts, scenes, teacher_file, train
from torch import nn

from diffkd import DiffKD
from diffkd.commands.evaluate import evaluate
from diffkd.commands.export import export
from diffkd.files.weights import read_weights, save_student
from diffkd.methods.box_kd import BoxKD
from diffkd.methods.shared import Shared
from diffkd.tasks.detection import CocoPrecision, Detection, classes_of
from diffkd.tasks.options import DetectionOptions
from diffkd.training.checkpointing import Interrupted
from diffkd.training.models import build_teacher

METHODS = [functools.partial(Shared, method=functools.partial(DiffKD, kd_weight=5.0)), BoxKD]


def boxes(*corners, labels=None, **more):
    """A target, or with scores a detection."""
    found = {"boxes": torch.tensor(np.array(corners), dtype=torch.float32).reshape(-1, 4)}
    found["labels"] = torch.tensor(labels or [1] * len(corners), dtype=torch.int64)
    return found | {name: torch.tensor(values, dtype=torch.float32) for name, values in more.items()}


def measure(*images):
    """The numbers for pairs of detection and target."""
    meter = CocoPrecision(torch.device("cpu"))
    for detection, target in images:
        if "iscrowd" in target:
            target["iscrowd"] = target["iscrowd"].long()
        meter.take([detection], [target])
    row = meter.compute()
    assert set(row) <= set(Detection.metrics)
    return row


A, B, FAR = (10, 10, 60, 50), (70, 10, 90, 90), (200, 200, 230, 230)


def test_a_missing_library_is_named_before_the_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs faster_coco_eval.*pip install 'diffkd\[detection\]'"):
        Detection(CLASSES)


def test_all_found_and_nothing_else():
    target = boxes(A, B, labels=[1, 2])
    found = measure((boxes(A, B, labels=[1, 2], scores=[0.9, 0.4]), target))
    assert {found[name] for name in ("ap", "ap50", "ap75", "ar10", "ar100")} == {1.0}
    wrong = measure((boxes(A, B, labels=[2, 1], scores=[0.9, 0.4]), target))
    assert wrong["ap"] == wrong["ar100"] == 0.0


def test_a_mistake_between_two_hits():
    """Precision is 1 up to recall 0.5 (51 of 101 points), and 2/3 from there on."""
    found = measure((boxes(A, FAR, B, scores=[0.9, 0.8, 0.7]), boxes(A, B)))
    for name in ("ap", "ap50", "ap75"):
        assert found[name] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-6)
    assert (found["ar1"], found["ar10"]) == (0.5, 1.0)


def test_overlap_decides():
    """An overlap of 0.62 counts at 0.5, 0.55 and 0.6, three of the ten."""
    found = measure((boxes((0, 0, 100, 62), scores=[0.5]), boxes((0, 0, 100, 100))))
    assert (found["ap50"], found["ap75"]) == (1.0, 0.0)
    assert found["ap"] == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize(("crowd", "expected"), [(1.0, 1.0), (0.0, (51 * 0.5) / 101)])
def test_crowds_are_not_counted(crowd, expected):
    """What lies in a crowd is neither hit nor mistake; were it an object, half would be missed, the rest come late."""
    target = boxes(A, (100, 100, 400, 400), area=[2000, 90000], iscrowd=[0, crowd])
    found = measure((boxes((150, 150, 200, 200), A, scores=[0.9, 0.8]), target))
    assert found["ap50"] == pytest.approx(expected, abs=1e-6)


def test_images_without_objects_or_detections():
    nothing = boxes(scores=[])
    assert measure((nothing, boxes(A)))["ap"] == 0.0
    # A surer detection where there is nothing halves the precision; an object without detection halves the recall.
    assert measure((boxes(A, scores=[0.5]), boxes(A)), (boxes(B, scores=[0.9]), boxes()))["ap"] == pytest.approx(0.5)
    assert measure((boxes(A, scores=[0.5]), boxes(A)), (nothing, boxes(B)))["ap"] == pytest.approx(51 / 101)
    for alone in (nothing, boxes(A, scores=[0.9])):
        assert measure((alone, boxes())) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}


def test_sizes_go_by_the_annotated_area():
    found = measure((boxes(A, scores=[0.9]), boxes(A, area=[100.0], iscrowd=[0])))
    assert found["ap_small"] == 1.0
    assert "ap_medium" not in found
    assert "ap_large" not in found
    plain = measure((boxes(A, scores=[0.9]), boxes(A)))  # 50 x 40 pixels
    assert plain["ap_medium"] == 1.0
    assert "ap_small" not in plain


def test_it_begins_anew():
    meter = CocoPrecision(torch.device("cpu"))
    meter.take([boxes(FAR, scores=[0.9])], [boxes(A)])
    assert meter.compute()["ap"] == 0.0
    meter.take([boxes(A, scores=[0.9])], [boxes(A)])
    assert meter.compute()["ap"] == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_the_library(seed):
    draw = np.random.default_rng(seed)
    truth, found, pairs = {"images": [], "annotations": [], "categories": [{"id": 1}, {"id": 2}]}, [], []
    for image in range(12, 0, -1):
        count, more = draw.integers(0, 6), draw.integers(0, 4)
        corners = draw.uniform(0, 200, (count + more, 2))
        whole = np.concatenate([corners, corners + draw.uniform(5, 150, (count + more, 2))], 1).round(1)
        labels, crowd = draw.integers(1, 3, count + more), draw.random(count) < 0.15
        moved = whole + draw.uniform(-8, 8, whole.shape).round(1)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        scores = draw.integers(1, 9, count + more) / 8  # some of them equal
        area = (whole[:count, 2] - whole[:count, 0]) * (whole[:count, 3] - whole[:count, 1]) * 0.8
        truth["images"].append({"id": image, "width": 400, "height": 400})
        for index in range(count):
            left, top, right, bottom = whole[index].tolist()
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image,
                    "category_id": int(labels[index]),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(area[index]),
                    "iscrowd": int(crowd[index]),
                }
            )
        for index in range(count + more):
            left, top, right, bottom = moved[index].tolist()
            box = [left, top, right - left, bottom - top]
            one = {"image_id": image, "category_id": int(labels[index]), "bbox": box, "score": float(scores[index])}
            found.append(one)
        target = boxes(*whole[:count], labels=labels[:count].tolist(), area=area, iscrowd=crowd)
        target["image_id"] = torch.tensor(image)
        pairs.append((boxes(*moved, labels=labels.tolist(), scores=scores), target))
    measured = measure(*pairs)
    library = COCO(truth)
    evaluation = COCOeval_faster(library, library.loadRes(found), iouType="bbox", print_function=lambda *_: None)
    evaluation.run()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
    for name, value in zip(names, evaluation.stats, strict=False):
        assert measured.get(name, -1.0) == pytest.approx(value, abs=1e-6), name


def test_a_student_must_return_losses():
    task = Detection(CLASSES)
    step = task.step(([torch.zeros(3, 8, 8)], [boxes(A)], torch.tensor([4])), 0)
    assert set(task.losses({"loss_box": torch.tensor(1.0), "extra": torch.tensor(2.0)}, step)) == {
        "task/box",
        "task/extra",
    }
    for output in ([{"boxes": torch.zeros(0, 4)}], {}, None):
        with pytest.raises(TypeError, match="must return its losses by name"):
            task.losses(output, step)


@pytest.mark.parametrize("family", ["retinanet", "fcos", "fasterrcnn"])
def test_the_classes_of_a_detector_are_seen(family):
    assert classes_of(detector(family, num_classes=5)) == 5
    assert classes_of(nn.Identity()) is None
    batch = ([torch.rand(3, 64, 64)], [boxes((5, 5, 40, 40))], torch.tensor([0]))
    teacher = detector(family, num_classes=5).eval()
    assert Detection(CLASSES).judge(teacher, batch) is None
    with torch.no_grad():
        assert Detection(tuple("abcde")).judge(teacher, batch)[1] == 0.0


@pytest.mark.parametrize("family", ["retinanet", "fcos", "fasterrcnn"])
def test_a_teachers_classes_are_found_in_its_weights(tmp_path, family):
    theirs = detector(family, num_classes=7)
    save_student(theirs, tmp_path / "teacher.safetensors")
    options = DetectionOptions(64 if family == "fcos" else 32, anchor_scale=0.1)
    name = f"{family}/timm/test_resnet"
    weights = str(tmp_path / "teacher.safetensors")
    teacher, _ = build_teacher(name, facts(), weights=weights, pretrained=False, detection=options)
    assert classes_of(teacher) == 7


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return teacher_file(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, weights):
    """A training with distillation and average that was not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    train(scenes(), out, method=METHODS, weights=weights, ema=0.8)
    return out


def rows(run):
    return (run / "metrics.csv").read_text().splitlines()


@pytest.mark.parametrize("trip", [2, 5])
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, weights, whole, trip):
    options = {"method": METHODS, "weights": weights, "ema": 0.8}
    with pytest.raises(Interrupted, match="--resume"):
        train(scenes(trip, signal_self(signal.SIGTERM)), tmp_path, **options)
    train(scenes(), tmp_path, resume=True, **options)
    for name in ("student.safetensors", "best.safetensors"):
        assert same_weights(whole / name, tmp_path / name)
    assert [row.rpartition(",")[0] for row in rows(whole)] == [row.rpartition(",")[0] for row in rows(tmp_path)]


def test_what_a_run_leaves(whole):
    """Losses by name, the plain student alone, the average measured beside the student, and the card."""
    result = json.loads((whole / "result.json").read_text())
    assert (result["task"], result["score"]) == ("detection", "ap")
    terms = {name for name in result["last"] if name.startswith("train/")}
    assert {"train/task/classification", "train/task/bbox_regression", "train/boxes/kd"} < terms
    assert {"train/levels/kd", "train/levels/diffusion"} < terms
    assert {"gamma/levels", "ap_unaveraged"} < set(result["last"])
    plain = detector(norm="group")
    assert read_weights(whole / "student.safetensors").keys() == plain.state_dict().keys()
    assert result["parameters"] == sum(p.numel() for p in plain.parameters())
    denoiser = DiffKD(32, 32)
    assert result["method_parameters"] == sum(p.numel() for p in denoiser.parameters())  # shared, and counted once
    card = json.loads((whole / "student.json").read_text())
    assert card["detection"] == {"fpn_channels": 32, "norm": "group", "anchor_scale": 0.1}


def test_a_saved_detector_measures_as_recorded(tmp_path):
    result = train(scenes(), tmp_path, epochs=1, config=None)
    measured = evaluate(str(tmp_path), progress=False, accelerator="cpu", data=scenes())
    for name, value in measured.items():
        assert value == pytest.approx(result["last"][name], abs=1e-6), name
    file = export(str(tmp_path), tmp_path / "plain.safetensors")
    assert same_weights(file, tmp_path / "student.safetensors")
    assert evaluate(str(file), progress=False, accelerator="cpu", data=scenes()) == measured


def test_half_precision(tmp_path, weights):
    # Large enough that no level is a single cell: of those PyTorch's convolutions make NaN in bfloat16, on some CPUs.
    data = scenes(size=(160, 160))
    result = train(data, tmp_path, method=METHODS, weights=weights, precision="bf16-mixed", epochs=1)
    assert all(math.isfinite(value) for name, value in result["last"].items())


def test_nan_is_stopped_by_name(tmp_path):
    def spoil():
        data._loaders.train.annotations.boxes.boxes.fill_(float("nan"))

    data = scenes(1, spoil)
    with pytest.raises(FloatingPointError, match=r"'task/bbox_regression'.* at step \d; the images were finite"):
        train(data, tmp_path / "boxes", epochs=1)
    with pytest.raises(FloatingPointError, match=r"'task/(classification|bbox_regression)'"):
        train(scenes(), tmp_path / "rate", optimizer=functools.partial(torch.optim.SGD, lr=1e20), gradient_clip=None)
    assert not (tmp_path / "rate" / "result.json").exists()


SCRIPT = """
import sys, torch
from pathlib import Path
from small_detectors import scenes, train
from test_detection import METHODS

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(scenes(val_count=5), Path(sys.argv[1]), method=METHODS, weights=sys.argv[2], devices=2, epochs=1)
"""


def test_two_processes(tmp_path, weights):
    """They measure what one process measures of the same student."""
    script, out = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    folders = f"{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parent}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folders, "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, str(script), str(out), str(weights)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert (result["device"], result["last"]["step"]) == ("2 x cpu", 2)
    options = {"accelerator": "cpu", "progress": False, "data": scenes(val_count=5), "model": NAME}
    measured = evaluate(str(out), **options)
    for name, value in measured.items():
        assert value == pytest.approx(result["last"][name], abs=1e-5), name
