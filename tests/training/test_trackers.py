"""Loggers and callbacks by name, from the command line and from files; sample predictions as pictures."""

import csv
import json
import signal

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from short_trainings import arrays, signal_self, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_recipe import TRUST, write_recipe

from diffkd.commands import cli
from diffkd.recipes.trust import Gate, Trust, UsageError, named_code, own_code
from diffkd.tasks.classification import Classification
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.representation import Representation
from diffkd.training.checkpointing import Interrupted
from diffkd.training.options import FitOptions
from diffkd.training.trackers import SamplePictures, build_callbacks, build_loggers, check_monitored


def test_loggers_are_built_by_name_path_and_options(tmp_path):
    (default,) = build_loggers(None, tmp_path)
    assert isinstance(default, TensorBoardLogger)
    assert default.log_dir == str(tmp_path / "tensorboard")
    described = [
        "csv",
        "lightning.pytorch.loggers.TensorBoardLogger",
        {"class_path": "CSVLogger", "init_args": {"version": "x"}},
    ]
    first, second, third = build_loggers(described, tmp_path)
    assert [type(one) for one in (first, second, third)] == [CSVLogger, TensorBoardLogger, CSVLogger]
    assert (first.log_dir, third.log_dir) == (str(tmp_path / "csv"), str(tmp_path / "x"))
    assert build_loggers(first, tmp_path) == [first]


def test_a_resumed_run_keeps_the_rows_that_csv_has(tmp_path, image_files, model_file):
    loggers = ["csv", {"class_path": "CSVLogger", "init_args": {"version": 0}}]
    options = {"logger": loggers, "log_every": 3}

    def steps(name):
        with (tmp_path / name / "metrics.csv").open() as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row["step/task"]]

    with pytest.raises(Interrupted):
        train(arrays(image_files, 7, signal_self(signal.SIGTERM)), tmp_path, model_file, **options)
    before = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("csv", "version_0")]
    train(arrays(image_files), tmp_path, model_file, resume=True, **options)
    assert [(tmp_path / name / "metrics.csv").read_bytes() for name in ("csv", "version_0")] == before
    assert steps("csv") + steps("csv-2") == [3, 6, 9, 12, 15, 18]
    assert steps("version_0-2") == steps("csv-2")


def test_callbacks_are_built_by_name_and_options():
    described = [
        "LearningRateMonitor",
        {"class_path": "EarlyStopping", "init_args": {"monitor": "top1", "mode": "max"}},
    ]
    first, second = build_callbacks(described)
    assert isinstance(first, LearningRateMonitor)
    assert isinstance(second, EarlyStopping)
    assert build_callbacks(None) == []


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("wandbb", r"there is no 'wandbb'; there are .*csv.*wandb"),
        ("nowhere.at.Logger", r"there is no 'nowhere\.at\.Logger'"),
        ("pathlib.Path", "is no Logger of Lightning"),
        ({"class_path": "csv", "init_args": {"nam": "x"}}, r"has no option 'nam'; nearest: 'name'"),
        ({"class_path": "csv", "name": "x"}, "put options into init_args"),
        ({"class_path": "comet", "init_args": {"api_key": "secret"}}, "would be recorded with the run"),
        (5, "names no Logger"),
    ],
)
def test_what_is_no_logger_is_named(tmp_path, described, message):
    with pytest.raises(ValueError, match=message):
        build_loggers(described, tmp_path)


def test_a_callback_without_what_it_needs_is_named():
    with pytest.raises(ValueError, match="--callbacks: EarlyStopping cannot be made"):
        build_callbacks("EarlyStopping")


CLASSIFICATION = Classification(6)


@pytest.mark.parametrize(
    ("kind", "monitor", "mode", "message"),
    [
        ("EarlyStopping", "val_loss", "min", "'val_loss', which is not measured: give monitor one of top1, top5, loss"),
        ("EarlyStopping", "map", "max", "'map', which is not measured"),
        ("EarlyStopping", "top1", "min", "for its smallest value, and larger is better: add mode: max"),
        ("ModelCheckpoint", "top1_unaveraged", "min", "larger is better"),
    ],
)
def test_what_is_watched_in_vain_is_refused_before_the_first_epoch(kind, monitor, mode, message):
    given = build_callbacks({"class_path": kind, "init_args": {"monitor": monitor, "mode": mode}})
    with pytest.raises(ValueError, match=f"{kind} watches .*{message}"):
        check_monitored(given, CLASSIFICATION)


def test_what_is_measured_may_be_watched():
    """Also what a callback of one's own logs, of which nothing is known before."""

    class Own(Callback):
        pass

    check_monitored([EarlyStopping("top1_unaveraged", mode="max"), EarlyStopping("loss")], CLASSIFICATION)
    check_monitored([EarlyStopping("mine"), Own()], CLASSIFICATION)
    check_monitored([EarlyStopping("cka/1", mode="max")], Representation(teachers=[torch.flatten] * 2))


def test_a_training_is_not_begun_that_would_stop_for_what_it_does_not_measure(tmp_path, image_files, model_file):
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}
    with pytest.raises(ValueError, match="'val_loss', which is not measured"):
        train(arrays(image_files), tmp_path / "run", model_file, epochs=1, callbacks=stopping)
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_representation_has_no_predictions_to_draw(tmp_path):
    data = DataFacts(4, 3, (8, 8), (0.0,) * 3, (1.0,) * 3, (), None, task="representation")
    with pytest.raises(ValueError, match="sample_every=2 draws predictions, and a representation makes none"):
        SamplePictures(tmp_path, data, 2)


def test_a_training_logs_to_several_and_stops_early(tmp_path, image_files, model_file):
    stopping = {
        "class_path": "EarlyStopping",
        "init_args": {"monitor": "top1", "mode": "max", "min_delta": 1.1, "patience": 1},
    }
    options = {"logger": ["csv", "tensorboard"], "callbacks": [stopping, "LearningRateMonitor"], "sample_every": 1}
    result = train(arrays(image_files), tmp_path / "run", model_file, epochs=6, **options)
    assert result["last"]["epoch"] == 2  # an accuracy never rises by more than 1
    with (tmp_path / "run" / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("epoch/top1")]
    assert [float(row["epoch/top1"]) for row in rows][-1] == pytest.approx(result["last"]["top1"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert len(events.Images("samples")) == 2
    pictures = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in pictures] == ["epoch-0001.png", "epoch-0002.png"]
    with Image.open(pictures[0]) as picture:
        assert np.asarray(picture).std() > 0


def test_progress_in_a_notebook_is_shown_by_tqdm(tmp_path, image_files, model_file, capsys):
    train(arrays(image_files), tmp_path / "run", model_file, epochs=1, progress="notebook")
    assert "6/6" in capsys.readouterr().err


def test_a_file_may_name_local_loggers_alone(tmp_path):
    gate = Gate(FitOptions, Trust())
    for values in (
        {"logger": "csv"},
        {"logger": ["tensorboard", {"class_path": "lightning.pytorch.loggers.CSVLogger"}]},
    ):
        gate.check(values, "recipe.yaml")
    gate.check({"callbacks": ["EarlyStopping", "lightning.pytorch.callbacks.Timer"]}, "recipe.yaml")
    for values in (
        {"logger": "wandb"},
        {"logger": "[csv, MLFlowLogger]"},
        {"logger": {"class_path": "lightning.pytorch.loggers.WandbLogger"}},
        {"logger": "evil.module.Logger"},
        {"callbacks": "os.system"},
        {"callbacks": [{"class_path": "evil.module.Callback"}]},
    ):
        with pytest.raises(UsageError, match="a file is data"):
            gate.check(values, "recipe.yaml")
    Gate(FitOptions, Trust(["lightning.pytorch.loggers"])).check({"logger": "wandb"}, "recipe.yaml")
    # What was named on the command line is trusted when the run is read again.
    assert named_code(["--logger", "wandb"]) == named_code(["--logger=[wandb]"]) == ["lightning.pytorch.loggers"]
    assert named_code(["--logger=csv"]) == []
    assert own_code({"logger": ["csv", "wandb"], "callbacks": "mine.Stop"}) == ["lightning.pytorch.loggers", "mine"]


def test_the_command_line_takes_one_or_several(tmp_path, capsys):
    recipe = write_recipe(tmp_path, epochs=1)
    words = ["fit", str(recipe), f"--out={tmp_path / 'run'}", TRUST, "--progress=false", "--accelerator=cpu"]
    assert cli.main([*words, "--logger", "csv", "tensorboard", "--callbacks=Timer"]) == 0
    assert (tmp_path / "run" / "csv" / "metrics.csv").is_file()
    assert cli.main([*words, f"--out={tmp_path / 'other'}", "--logger=nothing"]) == 1
    assert "there is no 'nothing'" in capsys.readouterr().err
    assert cli.main([*words, f"--out={tmp_path / 'other'}", "--sample_every=0"]) == 1
    assert "sample_every=0 is no number of epochs" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("default")  # what its own dependencies are told about is not ours to mend
def test_mlflow_writes_into_the_folder_of_the_run(tmp_path, image_files, model_file, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    import sqlite3

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    train(arrays(image_files), tmp_path / "run", model_file, epochs=1, logger="mlflow", sample_every=1)
    with sqlite3.connect(tmp_path / "run" / "mlflow.db") as store:
        assert ("epoch/top1",) in store.execute("select distinct key from metrics").fetchall()
    assert list((tmp_path / "run" / "mlflow").rglob("*.png"))


@pytest.mark.filterwarnings("default")  # what its own dependencies are told about is not ours to mend
def test_wandb_logs_offline(tmp_path, image_files, model_file, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    described = {"class_path": "wandb", "init_args": {"offline": True}}
    train(arrays(image_files), tmp_path / "run", model_file, epochs=1, logger=described, sample_every=1)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["score"] == "top1"
