"""The figures of a run."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_recipe import MODELS, TRUST, write_recipe

from diffkd.commands import cli
from diffkd.commands.plot import _gammas, plot, saved_training
from diffkd.files.run_folder import RunFolder
from diffkd.reports.run_figures import draw_curves, draw_gammas, draw_scores


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def run(recipe):
    """The folder of a finished run of DiffKD."""
    assert (
        cli.main(["fit", str(recipe), f"--out={recipe.parent / 'run'}", "--accelerator=cpu", "--progress=false", TRUST])
        == 0
    )
    return recipe.parent / "run"


def test_course_looks_scores_and_gammas_of_a_distillation(run, tmp_path, capsys):
    assert cli.main(["plot", str(run), TRUST, f"--out={tmp_path}", "--images=3", "--gammas=10"]) == 0
    printed = [line.removeprefix(f"{tmp_path}/") for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == "course.png"
    assert printed[-1] == "gamma.png"
    assert sorted(re.sub("-.*", "", name) for name in printed[1:-1]) == ["looks", "scores"]
    for name in printed:
        with Image.open(tmp_path / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_what_is_drawn_is_what_was_trained(run):
    training, data = saved_training(RunFolder(run), [str(MODELS)])
    fresh = saved_training(RunFolder(run), [str(MODELS)])[0].student
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(load_file(run / "student.safetensors"))
    images = next(iter(data.val_dataloader()))[0]
    with torch.no_grad():
        assert torch.equal(training.student.eval()(images), fresh.eval()(images))


def test_what_is_drawn_of_an_averaged_student_is_the_average(recipe, tmp_path):
    out = tmp_path / "averaged"
    options = ["--ema=0.5", "--epochs=1", "--accelerator=cpu", "--progress=false"]
    assert cli.main(["fit", str(recipe), f"--out={out}", TRUST, *options]) == 0
    saved = load_file(out / "student.safetensors")
    training, _ = saved_training(RunFolder(out), [str(MODELS)])
    for shown in (training.student, training.result):
        state = shown.state_dict()
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_gammas_are_those_of_as_many_images(run):
    training, data = saved_training(RunFolder(run), [str(MODELS)])
    training.eval()
    found = _gammas(training, data.val_dataloader(), 15)
    assert set(found) == set(training.distiller.names)
    assert {len(values) for values in found.values()} == {20}  # whole batches of ten
    assert all(((values > 0) & (values < 1)).all() for values in found.values())


def test_the_student_alone_has_a_course(recipe, tmp_path):
    out = tmp_path / "alone"
    options = ["--teacher=null", "--method=null", "--epochs=1", "--accelerator=cpu", "--progress=false"]
    assert cli.main(["fit", str(recipe), f"--out={out}", TRUST, *options]) == 0
    assert plot(str(out), progress=False, trust=[str(MODELS)]) == [out / "figures" / "course.png"]


def test_methods_without_gamma_have_no_histogram(recipe, tmp_path):
    out = tmp_path / "fitnet"
    options = ["--method=diffkd.FitNet", "--epochs=1", "--accelerator=cpu", "--progress=false"]
    assert cli.main(["fit", str(recipe), f"--out={out}", TRUST, *options]) == 0
    course, looks = plot(str(out), images=2, progress=False, trust=[str(MODELS)])
    assert (course.name, looks.name[:6]) == ("course.png", "looks-")


def test_a_checkpoint_of_another_model_is_refused(run, tmp_path, capsys):
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    config = changed / "config.yaml"
    (student,) = re.findall(r"^student: (.*)$", config.read_text(), re.MULTILINE)
    config.write_text(config.read_text().replace(f"student: {student}", "student: cifar/resnet14"))
    assert cli.main(["plot", str(changed), TRUST]) == 1
    message = capsys.readouterr().err
    assert f"{changed / 'checkpoints' / 'last.ckpt'} does not fit the models that {config} names" in message
    assert "Missing key" in message or "size mismatch" in message


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert cli.main(["plot", str(tmp_path)]) == 1
    assert "give the folder of a run that ended an epoch" in capsys.readouterr().err


def test_numbers_of_images_are_checked(run):
    with pytest.raises(ValueError, match="images and gammas must be at least 1, got 0 and 1000"):
        plot(str(run), images=0)


def test_the_course_shows_what_there_is(tmp_path):
    rows = [{"epoch": 1, "top1": 0.5, "train/task": 2.0, "gamma/a": 0.9}, {"epoch": 2, "top1": 0.75, "train/task": 0.0}]
    with Image.open(draw_curves(tmp_path / "all.png", rows, "top1")) as all_panels:
        three = all_panels.width
    with Image.open(draw_curves(tmp_path / "some.png", [{"epoch": 1, "top1": 0.5}], "top1")) as one_panel:
        assert three == 3 * one_panel.width


def test_scores_are_of_the_teachers_likeliest_classes(tmp_path):
    teacher = torch.tensor([[0.05, 0.5, 0.1, 0.0, 0.15, 0.2]])
    path = draw_scores(
        tmp_path / "a.svg",
        [torch.rand(4, 5, 5)],
        {"student": teacher.flip(1), "teacher": teacher},
        ["u", r"v$\frac$", *"wxyz"],
    )
    named = re.findall(r"<!-- ([a-z]\S*) -->", path.read_text(encoding="utf-8"))
    assert named == [r"v$\frac$", "z", "y", "w", "u", "student", "teacher"]


def test_the_mean_gamma_is_written(tmp_path):
    path = draw_gammas(tmp_path / "a.svg", {"layer": torch.tensor([0.25, 0.75, 0.8])})
    assert "layer: mean 0.600, n = 3" in path.read_text(encoding="utf-8")
