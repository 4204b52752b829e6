"""Trainings with several teachers, from Python and from the command line."""

import pytest
import torch
import yaml
from short_trainings import arrays, train

from diffkd import FitNet, save_student
from diffkd.commands.arguments import values_of_fit
from diffkd.data import Augmentation
from diffkd.distill.distiller import Distiller
from diffkd.files.history import read_csv
from diffkd.models import load_model
from diffkd.recipes.trust import UsageError
from diffkd.training.options import Teacher

DATA = "--data=diffkd.data.FashionSubset"


@pytest.fixture
def teachers(model_file, tmp_path):
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = load_model(f"{model_file}:large", num_classes=6, in_channels=3)
        file = save_student(model, tmp_path / f"teacher{seed}.safetensors")
        found.append(Teacher(f"{model_file}:large", str(file), weight=0.5 + seed))
    return found


def test_a_second_student_costs_no_teacher(tmp_path, image_files, model_file, teachers, monkeypatch):
    passes = []
    run = Distiller._teach
    monkeypatch.setattr(Distiller, "_teach", lambda self, inputs, calls: passes.append(1) or run(self, inputs, calls))
    rows = []
    for name in ("first", "second"):
        passes.clear()
        data = arrays(image_files, augmentation=Augmentation(), labels=False)
        options = {"teacher": teachers, "method": FitNet, "teacher_cache": tmp_path / "cache", "epochs": 2}
        train(data, tmp_path / name, model_file, **options)
        rows.append(read_csv(tmp_path / name / "metrics.csv")[-1])
        # One pass over the example when the cache is opened; of the first student also one for each batch, once.
        assert len(passes) == {"first": 1 + 6, "second": 1}[name]
    assert {**rows[0], "seconds": 0} == {**rows[1], "seconds": 0}
    assert {"train/teacher0:embedding/kd", "cka/1", "teacher_knn/0"} <= rows[0].keys()


def test_teachers_are_repeated_or_listed(tmp_path):
    repeated = values_of_fit(["--student=a", "--out=b", DATA, "--teacher", "timm/x", "--teacher=timm/y"])
    assert repeated["teacher"] == ["timm/x", "timm/y"]
    recipe = tmp_path / "recipe.yaml"
    listed = [{"name": "timm/x", "weights": "x.pth", "weight": 0.5}, "timm/y"]
    recipe.write_text(yaml.safe_dump({"student": "a", "out": "b", "teacher": listed}))
    first, second = values_of_fit([str(recipe), DATA])["teacher"]
    assert (first["name"], first["weight"], second) == ("timm/x", 0.5, "timm/y")
    assert values_of_fit(["--student=a", "--out=b", DATA, "--teacher", "timm/x"])["teacher"] == "timm/x"


@pytest.mark.parametrize("listed", ["nets.py:large", {"name": "nets.py:large"}])
def test_code_in_a_list_of_a_file_is_not_run(tmp_path, listed):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"student": "a", "out": "b", "teacher": ["timm/x", listed]}))
    with pytest.raises(UsageError, match=r"recipe.yaml: teacher names 'nets.py:large'.*--trust nets.py"):
        values_of_fit([str(recipe), DATA])


def test_one_file_is_not_of_several(tmp_path, image_files, model_file):
    options = {"teacher": ["timm/x", "timm/y"], "teacher_weights": "x.pth", "method": FitNet}
    with pytest.raises(ValueError, match=r"x\.pth are of one teacher, and there are 2: give each its own"):
        train(arrays(image_files), tmp_path, model_file, **options)
