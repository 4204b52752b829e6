"""An interrupted training that goes on ends with the same bits as one that was not interrupted."""

import csv
import json
import shutil
import signal
from functools import partial

import pytest
import torch
from short_trainings import METHODS, arrays, same_weights, signal_self, train

from diffkd import KD
from diffkd.training.checkpointing import Interrupted


def without_seconds(path):
    with path.open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(first, second):
    for name in ("student.safetensors", "best.safetensors"):
        assert same_weights(first / name, second / name), name
    assert without_seconds(first / "metrics.csv") == without_seconds(second / "metrics.csv")
    one, other = (json.loads((run / "result.json").read_text()) for run in (first, second))
    assert one["best"] == other["best"]
    assert one["last"] | {"seconds": 0} == other["last"] | {"seconds": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, image_files, model_file):
    """Train without interruption, once for each choice of method and average."""
    done = {}

    def run(method, ema):
        if (method, ema) not in done:
            done[method, ema] = tmp_path_factory.mktemp("whole")
            train(arrays(image_files), done[method, ema], model_file, method=METHODS[method], ema=ema)
        return done[method, ema]

    return run


@pytest.mark.parametrize(
    ("method", "ema", "trip"),
    [("plain", None, 3), ("plain", 0.8, 6), ("diffkd", None, 14), ("diffkd", 0.8, 2), ("diffkd", 0.8, 11)],
)
def test_stopped_by_a_signal(tmp_path, image_files, model_file, whole, method, ema, trip):
    """Stopped in mid-epoch (3, 14, 2), in the last step of an epoch (11) and in the first (6)."""
    options = {"method": METHODS[method], "ema": ema}
    data = arrays(image_files, trip, signal_self(signal.SIGTERM))
    with pytest.raises(Interrupted, match="--resume"):
        train(data, tmp_path / "stopped", model_file, **options)
    assert not (tmp_path / "stopped" / "result.json").exists()
    train(arrays(image_files), tmp_path / "stopped", model_file, resume=True, **options)
    assert_same_run(whole(method, ema), tmp_path / "stopped")


@pytest.mark.parametrize(("every", "trip"), [(None, 9), (1, 12), (2, 17), (4, 7)])
def test_killed(tmp_path, image_files, model_file, whole, every, trip):
    """Whatever was saved last is gone on from: at the end of an epoch, or within one."""
    options = {"method": METHODS["diffkd"], "ema": 0.8, "save_every_steps": every}
    with pytest.raises(ConnectionError):
        train(arrays(image_files, trip), tmp_path / "killed", model_file, **options)
    seen = []
    data = arrays(image_files, 0, lambda: seen.append(data.start_batch))
    train(data, tmp_path / "killed", model_file, resume=True, **options)
    saved = max(trip // 6 * 6, 0 if every is None else trip // every * every)
    assert seen == [saved % 6]
    assert_same_run(whole("diffkd", 0.8), tmp_path / "killed")


@pytest.mark.parametrize(("every", "goes_on"), [(None, 0), (2, 4)])
def test_an_optimiser_that_flattens_and_calls_the_step_back(tmp_path, image_files, model_file, every, goes_on):
    """L-BFGS views each parameter as one row, which those with the channels last are not."""
    options = {"method": KD, "optimizer": partial(torch.optim.LBFGS, lr=0.1, max_iter=2), "epochs": 2}
    options["save_every_steps"] = every
    train(arrays(image_files), tmp_path / "whole", model_file, **options)
    with pytest.raises(ConnectionError):
        train(arrays(image_files, 11), tmp_path / "killed", model_file, **options)
    seen = []
    data = arrays(image_files, 0, lambda: seen.append(data.start_batch))
    train(data, tmp_path / "killed", model_file, resume=True, **options)
    assert seen == [goes_on]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_interrupted_again_and_again(tmp_path, image_files, model_file, whole):
    options = {"method": METHODS["diffkd"], "ema": 0.8}
    for trip in (2, 2, 5):
        data = arrays(image_files, trip, signal_self(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(data, tmp_path / "stopped", model_file, resume=True, **options)
    train(arrays(image_files), tmp_path / "stopped", model_file, resume=True, **options)
    assert_same_run(whole("diffkd", 0.8), tmp_path / "stopped")


def test_asked_twice_it_stops_at_once(tmp_path, image_files, model_file):
    def twice():
        for _ in range(2):
            signal_self(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt):
        train(arrays(image_files, 8, twice), tmp_path / "stopped", model_file)
    assert train(arrays(image_files), tmp_path / "stopped", model_file, resume=True)["last"]["epoch"] == 3


def test_a_finished_run_is_not_repeated(tmp_path, image_files, model_file):
    first = train(arrays(image_files), tmp_path, model_file)
    written = (tmp_path / "student.safetensors").stat().st_mtime_ns
    (tmp_path / ".report.html.abcd1234.partial").touch()
    assert train(arrays(image_files), tmp_path, model_file, resume=True) == first
    assert (tmp_path / "student.safetensors").stat().st_mtime_ns == written
    assert not (tmp_path / ".report.html.abcd1234.partial").exists()


def test_results_that_were_not_written_are_written(tmp_path, image_files, model_file):
    """Killed after the last checkpoint: nothing is trained again."""
    first = train(arrays(image_files), tmp_path, model_file)
    for name in ("result.json", "student.safetensors"):
        (tmp_path / name).unlink()
    data = arrays(image_files, 0)  # would fail at the first batch
    assert train(data, tmp_path, model_file, resume=True)["last"] == first["last"]
    assert (tmp_path / "student.safetensors").exists()


def test_the_seed_decides(tmp_path, image_files, model_file):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(arrays(image_files), tmp_path / name, model_file, seed=seed, method=METHODS["diffkd"], epochs=1)
    assert same_weights(tmp_path / "one" / "student.safetensors", tmp_path / "two" / "student.safetensors")
    assert not same_weights(tmp_path / "one" / "student.safetensors", tmp_path / "three" / "student.safetensors")


def test_a_folder_that_is_removed_is_written_again(tmp_path, image_files, model_file, whole):
    """With all that the run knows, so that it ends as it would have, and can be resumed."""
    options = {"method": METHODS["plain"], "ema": None}
    run = tmp_path / "run"
    data = arrays(image_files, 8, lambda: shutil.rmtree(run))
    with (
        pytest.warns(UserWarning, match="run was removed while the training wrote into it: it is written again"),
        pytest.warns(UserWarning, match="tensorboard cannot be written"),
    ):
        train(data, run, model_file, save_every_steps=2, **options)
    assert same_weights(whole("plain", None) / "student.safetensors", run / "student.safetensors")
    assert without_seconds(whole("plain", None) / "metrics.csv") == without_seconds(run / "metrics.csv")
    assert (run / "config.yaml").is_file()


def test_a_log_of_tensorboard_that_cannot_be_written_ends_nothing(tmp_path, image_files, model_file):
    (tmp_path / "tensorboard").write_text("in the way of the folder")
    with pytest.warns(
        UserWarning, match="tensorboard cannot be written .*: the training goes on without this log"
    ) as said:
        train(arrays(image_files), tmp_path, model_file, epochs=1, resume=True)
    assert len(said) == 1
    assert (tmp_path / "result.json").is_file()
