"""Runs, cards and checkpoints that an older version left are gone on with, measured and exported.

`runs-0.1.0.tar.xz` holds a run that ended, one that a signal stopped after 7 of 12 steps, and what both were trained
on; written by version 0.1.0 before its modules were moved into sub-packages.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from diffkd import read_weights
from diffkd.commands import cli

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "runs-0.1.0.tar.xz"


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Unpack the runs and stand beside them, as their configs name files relatively."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_interrupted_run_is_resumed_and_ends_as_the_whole_one(runs):
    assert cli.main(["fit", "stopped/config.yaml", "--resume", "--trust", "nets.py", "--progress", "false"]) == 0
    ours, theirs = (read_weights(runs / run / "student.safetensors") for run in ("stopped", "finished"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # 12 steps in float32: the kernels of another processor round otherwise.
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
    result = json.loads((runs / "stopped" / "result.json").read_text())
    assert result["last"]["epoch"] == 3


def test_a_finished_run_is_not_trained_again(runs, capsys):
    before = (runs / "finished" / "student.safetensors").read_bytes()
    assert cli.main(["fit", "finished/config.yaml", "--resume", "--trust", "nets.py"]) == 0
    assert (runs / "finished" / "student.safetensors").read_bytes() == before


def test_its_student_is_measured_from_its_card(runs, capsys):
    card = json.loads((runs / "finished" / "student.json").read_text())
    assert cli.main(["test", "finished", "--model", "nets.py:small"]) == 0
    assert f"{100 * card['metrics']['top1']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["finished", "stopped", "stopped/checkpoints/last.ckpt"])
def test_its_student_is_exported(runs, source):
    assert cli.main(["export", source, "--out", "student.safetensors"]) == 0
    assert read_weights("student.safetensors").keys() == read_weights("finished/student.safetensors").keys()
    assert json.loads(Path("student.json").read_text())["model"] == "nets.py:small"
