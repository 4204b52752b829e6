"""Balanced pairs, standardised targets and what the start report says of them, in whole trainings."""

import io
import json
import signal
from functools import partial

import pytest
import torch
from rich.console import Console
from short_trainings import arrays, built, same_weights, signal_self, train

from diffkd import KD, Balance, DiffKD, Pair
from diffkd.commands.arguments import values_of_fit
from diffkd.files.history import read_csv
from diffkd.training.callbacks import report, stuck_gammas
from diffkd.training.checkpointing import Interrupted

PAIRS = [
    Pair("0", method=partial(DiffKD, standardize=True, ae_channels=6), weight=Balance(0.5, every=2)),
    Pair("output", method=partial(KD, temperature=2.0), weight=300.0),
]


def run(files, out, models, trip=None, **options):
    data = arrays(files) if trip is None else arrays(files, trip, signal_self(signal.SIGTERM))
    return train(data, out, models, teacher=f"{models}:large", pairs=PAIRS, epochs=2, **options)


def test_an_interrupted_training_goes_on_with_the_same_weights(tmp_path, image_files, model_file, capsys):
    run(image_files, tmp_path / "whole", model_file, progress=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "pull of each pair, in that of the task (gradient norms at the student's layer): 0 0.5, output " in said
    assert "warning: pair output pulls" in said
    assert "times as hard as the task and drowns the task: lower its weight" in said
    assert "target of 0 standardised (standardization): mean " in said
    assert "target of 0 standardised (latent_standardization): mean " in said
    rows = read_csv(tmp_path / "whole" / "metrics.csv")
    assert all(float(row["weight/0"]) > 0 for row in rows)
    assert "weight/output" not in rows[0]
    with pytest.raises(Interrupted):
        run(image_files, tmp_path / "stopped", model_file, trip=9)
    run(image_files, tmp_path / "stopped", model_file, resume=True)
    first, second = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "stopped"))
    assert first["pulls"].keys() == {"0", "output"}
    assert second["pulls"] == first["pulls"]  # measured in the first step, before it was stopped
    assert same_weights(tmp_path / "whole" / "student.safetensors", tmp_path / "stopped" / "student.safetensors")


@pytest.mark.parametrize(("weight", "words"), [(1e-6, "hardly counts: raise its weight"), (1e6, "drowns the task")])
def test_a_pull_out_of_proportion_is_said(image_files, model_file, weight, words):
    data = arrays(image_files)
    training = built(
        f"{model_file}:small", data, teacher=f"{model_file}:large", pairs=[Pair("0", method=DiffKD, weight=weight)]
    )
    training.measures_pulls = True
    batch = next(iter(data.train_dataloader()))
    training.terms(training.task.step(batch, 0))
    console = Console(file=io.StringIO(), width=500)
    report(training, batch, console)
    assert words in console.file.getvalue()
    assert not training.measures_pulls
    first = training.pulls
    training.terms(training.task.step(batch, 0))
    assert training.pulls is first


def test_a_gamma_that_adds_no_noise_is_said(image_files, model_file):
    options = {"teacher": f"{model_file}:large", "method": DiffKD}
    training = built(f"{model_file}:small", arrays(image_files), **options)
    means = {"gamma/0": 0.995, "gamma/output": 0.98}
    assert stuck_gammas(training, means) == ["0"]


def test_without_a_noise_adapter_there_is_no_gamma(image_files, model_file):
    data = arrays(image_files)
    options = {"teacher": f"{model_file}:large", "method": partial(DiffKD, noise_adapter=False)}
    training = built(f"{model_file}:small", data, **options)
    training.terms(training.task.step(next(iter(data.train_dataloader())), 0))
    assert training.distiller.gammas == {}


def test_a_recipe_names_a_balance(tmp_path):
    words = ["demo", f"--out={tmp_path}", "--pairs=[{student: layer3, weight: {balance: 2.0}}, {student: output}]"]
    pairs = values_of_fit(words)["pairs"]
    assert pairs[0]["weight"] == {"balance": 2.0, "every": 10, "momentum": 0.9}
    assert pairs[1]["weight"] == 1.0


def test_compiled_trainings_measure_in_between(image_files, model_file):
    data = arrays(image_files)
    training = built(f"{model_file}:small", data, teacher=f"{model_file}:large", pairs=PAIRS[:1], channels_last=False)
    training.model.compile(backend="eager")
    batch = next(iter(data.train_dataloader()))
    try:
        for _ in range(3):
            terms = training.terms(training.task.step(batch, 0))
            assert all(term.isfinite() for term in terms.values())
    finally:
        torch.compiler.reset()
    assert training.distiller.balancer.calls == 3
