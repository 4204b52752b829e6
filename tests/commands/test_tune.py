"""`diffkd tune`: a search on held-out training data."""

import csv
import json
import re
import shutil

import optuna
import pytest
import yaml
from tiny_recipe import MODELS, TRUST, write_recipe

from diffkd.commands import cli
from diffkd.commands.arguments import values_of_fit
from diffkd.commands.tune import Axis, _sampler, _taken, found_space, tune, with_values


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two trials of the weight of FitNet and of a switch, and then two more."""
    folder = tmp_path_factory.mktemp("tune")
    recipe = write_recipe(folder, epochs=1)
    (folder / "test.npz").rename(folder / "elsewhere.npz")  # replaced by images that must not count
    shutil.copy(folder / "train.npz", folder / "test.npz")
    space = "{method.init_args.weight: {low: 0.5, high: 2.0, log: true}, method.init_args.standardize: [false, true]}"
    words = ["tune", str(recipe), f"--out={folder}/study", TRUST, "--method=fitnet", f"--space={space}", "--share=0.3"]
    codes = [cli.main([*words, f"--trials={count}", "--", "--accelerator=cpu"]) for count in (2, 5)]
    return folder / "study", codes, words


def test_it_leaves_the_best_recipe_and_what_mattered(study):
    folder, codes, _ = study
    assert codes == [0, 0]
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    done = [row for row in rows if row["state"] == "COMPLETE"]
    best = max(done, key=lambda row: float(row["value"]))
    assert rows[0]["method.init_args.weight"] == "1"
    recipe = yaml.safe_load((folder / "best.yaml").read_text())
    assert recipe["method"]["init_args"]["weight"] == pytest.approx(float(best["method.init_args.weight"]), rel=1e-2)
    assert "out" not in recipe
    assert values_of_fit([str(folder / "best.yaml"), TRUST, "--out=x"])["method"]["class_path"] == "diffkd.FitNet"
    assert (folder / "study.png").stat().st_size > 1000
    assert isinstance(json.loads((folder / "importance.json").read_text()), dict)


def test_trials_are_measured_on_held_out_training_images(study):
    folder, *_ = study
    result = json.loads((folder / "trial-0000" / "seed-0" / "result.json").read_text())
    config = yaml.safe_load((folder / "trial-0000" / "seed-0" / "config.yaml").read_text())
    assert config["held_out"] == 0.3
    # 12 of 40 images, so that the accuracy is a multiple of 1/12.
    assert (12 * result["last"]["top1"]) == pytest.approx(round(12 * result["last"]["top1"]), abs=1e-5)


def test_another_study_in_the_same_folder_is_refused(study, capsys):
    *_, words = study
    assert cli.main([*words[:-1], "--share=0.5"]) == 1
    error = capsys.readouterr().err
    assert "is another one" in error
    assert error.count("\n") == 1


def test_finished_studies_train_no_more(study):
    folder, _, words = study
    before = sorted(path.name for path in folder.iterdir())
    assert cli.main([*words, "--trials=3", "--", "--accelerator=cpu"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--trials=0"], 1, "at least one trial"),
        (["--share=1.0"], 1, r"a share in \(0, 1\)"),
        (["--space=[1, 2]"], 2, "--space holds no values by name"),
        (["--space={method.init_args.kd_weight: 3}"], 2, "kd_weight: 3 is nothing to search"),
        (["--space={optimizer.nothing.lr: [1, 2]}"], 1, "no optimizer.nothing that lr could be set in"),
        (["--method=alone"], 1, "no method to search"),
        (["--method=sp", "--what=options"], 1, "no options to search"),
    ],
)
def test_misuse_is_said_in_one_line(tmp_path, capsys, words, code, message):
    recipe = write_recipe(tmp_path)
    assert cli.main(["tune", str(recipe), f"--out={tmp_path}/study", TRUST, *words]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_a_trial_on_several_devices_is_refused_before_there_is_a_study(tmp_path, capsys, monkeypatch):
    words = ["tune", str(write_recipe(tmp_path)), f"--out={tmp_path}/study", TRUST, "--method=fitnet"]
    for option in ("--devices=2", "--devices=[0,1]", "--num_nodes=2"):
        assert cli.main([*words, "--", option]) == 1
        error = capsys.readouterr().err
        assert "a trial trains on one device. Give --devices 1, and use the others by starting the same" in error
        assert error.count("\n") == 1
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(words) == 1
    assert "torchrun started 2 processes" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_what_can_be_searched_is_found():
    values = {"method": [{"class_path": "diffkd.DiffKD", "init_args": {"kd_weight": 5.0}}, "diffkd.DIST"]}
    weights = found_space(values, "weights")
    assert weights["method.0.init_args.kd_weight"] == Axis(low=0.5, high=50.0, log=True)
    assert {"method.1.init_args.beta", "method.1.init_args.weight"} < set(weights)
    options = found_space(values, "options")
    assert options["method.0.init_args.prediction"].choices == ("noise", "clean", "velocity")
    assert options["method.0.init_args.standardize"].choices == (False, True)
    assert not set(weights) & set(options)
    assert set(found_space(values, "all")) == set(weights) | set(options)
    changed = with_values(values, {"method.1.init_args.beta": 3.0})
    assert changed["method"][1] == {"class_path": "diffkd.DIST", "init_args": {"beta": 3.0}}
    assert values["method"][1] == "diffkd.DIST"


def test_trials_of_other_jobs_are_counted_but_not_what_a_lost_worker_left():
    study = optuna.create_study()
    study.tell(study.ask(), 0.5)
    for owner in (["now", 0], ["now", 1], ["before", 1], None):
        trial = study.ask()
        if owner is not None:
            trial.set_user_attr("job", owner)
    assert [_taken(study, "now", job) for job in (0, 1, 2)] == [2, 2, 3]
    assert _taken(study, "later", 0) == 1


def test_processes_of_a_study_that_start_together_draw_different_values():
    study = optuna.create_study()
    drawn = []
    for _ in range(3):
        process = optuna.create_study(sampler=_sampler(study))
        drawn.append(process.ask().suggest_float("weight", 0, 1))
    assert len(set(drawn)) == 3


def test_options_that_do_not_go_together_and_bad_recipes(tmp_path):
    recipe = write_recipe(tmp_path, epochs=1)
    space = "{method.init_args.path: [diffusion, flow], method.init_args.prediction: [noise, clean]}"
    options = ["--accelerator=cpu"]
    found = tune(str(recipe), tmp_path / "study", space=space, trials=2, jobs=2, trust=[str(MODELS)], options=options)
    assert found["score"] == "top1"
    with (tmp_path / "study" / "trials.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2  # the job that ends first begins no third
    broken = ["--accelerator=cpu", "--optimizer.lr=1e30"]
    with pytest.raises(FloatingPointError):
        tune(str(recipe), tmp_path / "broken", space=space, trials=1, trust=[str(MODELS)], options=broken)
