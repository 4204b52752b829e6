import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from tiny_models import small
from tiny_recipe import MODELS, TRUST, write_recipe

from diffkd import read_weights, save_student
from diffkd.commands import compare as comparison
from diffkd.commands.arguments import fit_with, values_of_fit
from diffkd.commands.compare import Run, _start_worker, compare, find_method, find_pretrained, report, rich_table
from diffkd.commands.step_cost import step_costs
from diffkd.recipes.trust import UsageError
from diffkd.reports.tables import summarize


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe over 40 images that trains in a second, its teacher's weights made on the spot."""
    return write_recipe(tmp_path)


def test_trains_every_method_and_seed_once_and_reports(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [f"--teacher={MODELS}:large"]  # which the student alone does without
    rows = compare(str(recipe), out, methods=["alone", "diffkd"], seeds=2, jobs=2, options=options)
    assert [(row.method, row.seeds) for row in rows] == [("alone", (0, 1)), ("diffkd", (0, 1))]
    assert rows[0].method_parameters == 0 < rows[1].method_parameters
    table = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert table["rows"][1]["last"] == pytest.approx(rows[1].last)
    for seed in (0, 1):
        result = json.loads((out / "diffkd" / f"seed-{seed}" / "result.json").read_text(encoding="utf-8"))
        assert result["seed"] == seed
    assert "step / alone" in (out / "comparison.md").read_text(encoding="utf-8")
    assert rows[0].step_cost == 1 < rows[1].step_cost
    assert table["step_cost"]["methods"]["diffkd"]["rounds"] == comparison.ROUNDS
    assert (out / "comparison.png").stat().st_size > 1000

    # Again: nothing is trained twice, a run that was lost is trained again, and to the same end.
    kept, costs = out / "alone" / "seed-0" / "student.safetensors", (out / "step_cost.json").read_bytes()
    lost = out / "diffkd" / "seed-1" / "student.safetensors"
    before, trained = kept.stat().st_mtime_ns, lost.read_bytes()
    for file in sorted((out / "diffkd" / "seed-1").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    again = compare(str(recipe), out, methods=["alone", "diffkd"], seeds=2, options=options)
    assert kept.stat().st_mtime_ns == before
    assert (out / "step_cost.json").read_bytes() == costs
    assert lost.read_bytes() == trained
    assert [row.last for row in again] == [row.last for row in rows]


def test_a_run_with_other_values_is_refused_before_anything_is_trained(recipe: Path, tmp_path: Path) -> None:
    values = {"methods": ["alone"], "cost": False}
    folder = tmp_path / "out" / "alone" / "seed-0"
    trained = fit_with([str(recipe), f"--config={find_method('alone')}", f"--out={folder}", "--progress=false", TRUST])
    with pytest.raises(ValueError, match=r"alone.seed-0 was started with other values: .*optimizer\.lr is 0\.05 there"):
        compare(str(recipe), tmp_path / "out", seeds=2, options=[TRUST, "--optimizer.lr=0.00001"], **values)
    assert not (tmp_path / "out" / "alone" / "seed-1").exists()
    # What does not change the numbers may change, and a finished run needs no data.
    (tmp_path / "train.npz").unlink()
    (row,) = compare(str(recipe), tmp_path / "out", seeds=1, options=[TRUST, "--log_every=3"], **values)
    assert row.last == 100 * trained["last"]["top1"]


def test_costs_are_of_the_same_step_for_all(recipe: Path, tmp_path: Path) -> None:
    words = [str(recipe), f"--out={tmp_path / 'unused'}", TRUST]
    costs = step_costs({"first": words, "second": words}, "first", rounds=5)
    assert costs["first"].median == costs["first"].low == 1
    assert costs["second"].milliseconds > 0
    assert costs["second"].low <= costs["second"].median <= costs["second"].high
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ValueError, match="'kd' must be one of first"):
        step_costs({"first": words}, "kd")


DATA = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

class Own(LightningDataModule):
    num_classes, in_channels, image_size, classes = 4, 3, (8, 8), tuple("abcd")
    mean, std = (0.0,) * 3, (1.0,) * 3

    def example(self):
        return torch.zeros(2, 3, 8, 8)

    def setup(self, stage):
        labels = torch.arange(20) % 4
        self.images = TensorDataset(torch.rand(20, 3, 8, 8), labels, torch.arange(20))

    def train_dataloader(self):
        return DataLoader(self.images, batch_size=10)

    val_dataloader = train_dataloader
"""


def test_data_that_make_their_sets_in_setup_are_compared(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_data_of_compare.py").write_text(DATA, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    data = "own_data_of_compare.Own"
    recipe.write_text(f"student: {MODELS}:small\nteacher: {MODELS}:large\nepochs: 1\ndata: {data}\n")
    trusted = [str(MODELS), "own_data_of_compare"]
    rows = compare(str(recipe), tmp_path / "out", methods=["alone", "kd"], seeds=1, trust=trusted)
    assert [row.step_cost is not None for row in rows] == [True, True]


def test_costs_that_cannot_be_measured_are_left_out_of_the_table(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fails(*args: object, **options: object) -> None:
        assert "| alone" in (out / "comparison.md").read_text(encoding="utf-8"), "the table comes before the costs"
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "step_costs", fails)
        (row,) = compare(str(recipe), out, methods=["alone"], seeds=1, options=[TRUST, "--epochs=1"])
    assert row.step_cost is None
    said = capsys.readouterr().err
    assert "no costs of a training step, as it could not be measured (CUDA out of memory)" in said
    assert "Traceback" not in said
    (again,) = compare(str(recipe), out, methods=["alone"], seeds=1, options=[TRUST, "--epochs=1"])
    assert again.step_cost == 1
    assert "step / alone" in (out / "comparison.md").read_text(encoding="utf-8")


def test_failed_runs_are_named_and_the_others_reported(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("student: cifar/resnet9000\nteacher: null\nmethod: null\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed.*broken/seed-0\.log"):
        compare(str(recipe), tmp_path / "out", methods=["alone", str(broken)], seeds=1, trust=[str(MODELS)])
    assert "resnet9000" in (tmp_path / "out" / "broken" / "seed-0.log").read_text(encoding="utf-8")
    assert "broken seed 0 failed: model 'cifar/resnet9000' is unknown; nearest" in capsys.readouterr().err
    assert [row.method for row in report(tmp_path / "out", ["alone", "broken"], 1)] == ["alone"]
    with pytest.raises(RuntimeError, match=r"1 of 1 runs failed; see .*seed-0\.log\.$"):
        compare(str(recipe), tmp_path / "none", methods=[str(broken)], seeds=1, trust=[str(MODELS)])


def test_a_comparison_that_is_stopped_stops_its_runs_and_goes_on(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "compare",
        str(recipe),
        "--methods",
        "alone",
        "--seeds",
        "3",
        f"--out={out}",
        TRUST,
        "--",
        "--epochs",
        "2000",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffkd.commands.cli", *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    checkpoint = out / "alone" / "seed-0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert checkpoint.is_file()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert errors.splitlines()[-1] == "diffkd: the comparison was stopped; the same command goes on with it"
    assert "Traceback" not in errors
    assert "stopped after step" in (out / "alone" / "seed-0.log").read_text(encoding="utf-8")
    seen = checkpoint.stat().st_mtime_ns
    time.sleep(1.5)
    assert checkpoint.stat().st_mtime_ns == seen, "a run outlived the comparison"
    assert not (out / "alone" / "seed-0" / "result.json").exists()
    assert not (out / "alone" / "seed-1").exists(), "a run was begun after the comparison was asked to stop"
    assert os.access(checkpoint, os.R_OK)


@pytest.mark.cluster  # three processes that import everything
def test_runs_on_several_devices_are_processes_of_their_own(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken.yaml"
    broken.write_text("student: cifar/resnet9000\nteacher: null\nmethod: null\n", encoding="utf-8")
    two = ["--devices=2", "--accelerator=cpu", "--epochs=1"]
    with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
        compare(str(recipe), out, methods=["alone", str(broken)], seeds=1, cost=False, trust=[str(MODELS)], options=two)
    result = json.loads((out / "alone" / "seed-0" / "result.json").read_text(encoding="utf-8"))
    assert result["device"] == "2 x cpu"
    assert " fit " in result["command"]
    assert [path.name for path in sorted(out.iterdir()) if path.is_dir()] == ["alone", "broken"]
    assert "broken seed 0 failed: model 'cifar/resnet9000' is unknown; nearest" in capsys.readouterr().err


@pytest.mark.cluster  # four processes that import everything, to be started and stopped
def test_runs_on_several_devices_are_stopped_with_the_comparison(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "out" / "alone" / "seed-0"
    words = ["compare", str(recipe), "--methods", "alone", "--seeds=1", f"--out={tmp_path / 'out'}", TRUST, "--"]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffkd", *words, "--epochs=2000", "--devices=2", "--accelerator=cpu"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    checkpoint = run / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 240
    while not checkpoint.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert checkpoint.is_file()
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped after step" in run.with_suffix(".log").read_text(encoding="utf-8")
    seen = checkpoint.stat().st_mtime_ns
    time.sleep(1.5)
    assert checkpoint.stat().st_mtime_ns == seen, "a run outlived the comparison"


def test_several_processes_or_machines_for_a_comparison_are_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--num_nodes: the runs of a comparison train on one machine each"):
        compare(str(recipe), out, methods=["alone"], options=[TRUST, "--num_nodes=2"])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(ValueError, match="srun started 4 processes of `diffkd compare`, each of which would do all"):
        compare(str(recipe), out, methods=["alone"], options=[TRUST])
    assert not out.exists()


def save_pretrained(folder: Path) -> Path:
    """Write the students of two seeds, as a comparison of the method "cosine" leaves them."""
    for seed in (0, 1):
        torch.manual_seed(100 + seed)
        (folder / "cosine" / f"seed-{seed}").mkdir(parents=True)
        save_student(small(4, 3), folder / "cosine" / f"seed-{seed}" / "student.safetensors")
    return folder / "cosine"


def test_what_was_pretrained_is_fine_tuned_seed_by_seed(recipe: Path, tmp_path: Path) -> None:
    cosine, out = save_pretrained(tmp_path / "before"), tmp_path / "after"
    # As recipes for fine-tuning do, it names weights that the row without pretraining must not want.
    recipe.write_text(recipe.read_text() + "student_weights: runs/pretrained\n", encoding="utf-8")
    options = [TRUST, "--epochs=1", "--optimizer.lr=0"]  # so that students keep the weights they start from
    rows = compare(str(recipe), out, pretrained=[str(cosine.parent)], seeds=2, cost=False, options=options)
    assert [(row.method, row.seeds) for row in rows] == [("alone", (0, 1)), ("alone-from-cosine", (0, 1))]
    assert "alone" in rows[1].against
    for seed in (0, 1):
        starts, other, ends = (
            read_weights(folder / f"seed-{seed}" / "student.safetensors")["0.0.weight"]
            for folder in (cosine, out / "alone", out / "alone-from-cosine")
        )
        assert torch.equal(starts, ends)
        assert not torch.equal(starts, other)


def test_a_pretraining_takes_the_place_of_what_a_recipe_starts_from(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, dict[str, Any]] = {}

    def read(commands: dict[Run, list[str]], *others: object) -> list[Run]:
        seen.update({run.method: values_of_fit(words) for run, words in commands.items()})
        return list(commands)  # as if all had failed

    monkeypatch.setattr("diffkd.commands.compare.train_all", read)
    cosine = save_pretrained(tmp_path / "before")
    recipe.write_text(
        recipe.read_text() + "student_weights: own\nstudent_pretrained: true\npretrained_backbone: true\n"
    )
    with pytest.raises(RuntimeError, match="2 of 2 runs failed"):
        compare(str(recipe), tmp_path / "out", pretrained=[str(cosine)], seeds=1, trust=[str(MODELS)])
    starts = {
        method: [values.get(name) for name in ("student_weights", "student_pretrained", "pretrained_backbone")]
        for method, values in seen.items()
    }
    assert starts == {"alone": [None, True, True], "alone-from-cosine": [str(cosine / "seed-0"), False, False]}


def test_a_pretraining_that_lacks_a_run_is_refused_before_anything_is_trained(recipe: Path, tmp_path: Path) -> None:
    cosine = save_pretrained(tmp_path / "before")
    assert find_pretrained([str(cosine)], 1) == {"cosine": [cosine / "seed-0"]}

    def refused(*pretrained: Path, seeds: int = 2, methods: list[str] | None = None) -> str:
        with pytest.raises((FileNotFoundError, ValueError)) as refusal:
            compare(str(recipe), tmp_path / "out", pretrained=list(map(str, pretrained)), seeds=seeds, methods=methods)
        assert not (tmp_path / "out").exists()
        return str(refusal.value)

    assert "cosine/seed-2 is no finished run: finish it, give fewer --seeds than 3" in refused(cosine, seeds=3)
    assert "is no comparison: there is neither seed-0 nor METHOD/seed-0 in it" in refused(tmp_path)
    assert "two pretrainings are named 'cosine'" in refused(cosine, cosine.parent)
    own = tmp_path / "kd-from-cosine.yaml"
    own.write_text("epochs: 1\n", encoding="utf-8")
    assert "'kd-from-cosine' is both a method's file and a pretraining" in refused(cosine, methods=["kd", str(own)])


@pytest.mark.parametrize("values", [{"methods": []}, {"methods": ["kd", "kd"]}, {"seeds": 0}, {"jobs": 0}])
def test_nonsense_is_refused_before_anything_is_trained(
    recipe: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="different methods"):
        compare(str(recipe), tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_fit_are_refused_before_anything_is_trained(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no option --epoks.*\(alone with the options of the comparison\)"):
        compare(str(recipe), tmp_path / "out", methods=["alone", "diffkd"], options=["--epoks=3"])
    assert not (tmp_path / "out").exists()


def test_a_cache_for_images_that_each_seed_draws_anew_is_refused(recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.yaml"
    data.write_text("data: {class_path: diffkd.data.UnlabelledFolder, init_args: {root: pictures}}\n", encoding="utf-8")
    cache = [f"--config={data}", f"--teacher_cache={tmp_path / 'cache'}", "--teacher_views=1"]
    with pytest.raises(ValueError, match=r"--teacher_cache .* of one seed, and val_share=0\.05 draws others from each"):
        compare(str(recipe), tmp_path / "out", methods=["fitnet"], options=cache, trust=[str(MODELS)])
    assert not (tmp_path / "out").exists()


def test_options_of_teacher_and_method_leave_the_student_alone(recipe: Path, tmp_path: Path) -> None:
    options = ["--method.kd_weight", "3", f"--teacher={MODELS}:large", "--teacher_cache_storage=float32", "--epochs=1"]
    cache = ["--teacher_cache", str(tmp_path / "cache"), "--method_weight=0.5"]
    values = {"methods": ["alone", "diffkd"], "seeds": 1, "cost": False, "trust": [str(MODELS)]}
    rows = compare(str(recipe), tmp_path / "out", options=[*options, *cache], **values)
    assert rows[0].method_parameters == 0 < rows[1].method_parameters
    config = yaml.safe_load((tmp_path / "out" / "diffkd" / "seed-0" / "config.yaml").read_text(encoding="utf-8"))
    assert (config["method"][0]["init_args"]["kd_weight"], config["method_weight"]) == (3, 0.5)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match="methods/diffkd"):
        find_method("difkd")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_on_a_terminal_cuts_no_number(width: int) -> None:
    def run(seed: int) -> dict[str, Any]:
        last = {"top1": 0.7 + seed / 50, "seconds": 123.0}
        return {"last": last, "best": {"top1": 0.75}, "parameters": 11_689_512, "peak_memory": 3392.0}

    methods = ("alone", "kd", "diffkd-dist")
    costs = {"reference": "kd", "methods": {method: {"median": 1.0} for method in methods}}
    rows = summarize({method: {seed: run(seed) for seed in range(3)} for method in methods}, "top1", costs)
    written = io.StringIO()
    Console(width=width, file=written).print(rich_table(rows, width))
    shown = written.getvalue()
    assert "…" not in shown
    assert "72.00 ± 2.00" in shown
    assert ("best epoch" in shown) == (width >= 120)


def test_a_run_whose_process_is_killed_is_said_in_one_line(tmp_path: Path, recipe: Path) -> None:
    models = tmp_path / "killed.py"
    models.write_text("import os\ndef model(num_classes, in_channels):\n    os.kill(os.getpid(), 9)\n")
    options = [f"--student={models}:model"]
    with pytest.raises(RuntimeError, match=r"process of a run was killed.*the same command goes on with it"):
        compare(str(recipe), tmp_path / "out", methods=["alone"], seeds=1, cost=False, options=options)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
def test_runs_stop_when_the_comparison_is_killed(tmp_path: Path) -> None:
    """They would go on unseen, and hold the folders that the next comparison needs."""
    mark = tmp_path / "pid"

    def work() -> None:
        _start_worker(1)
        mark.write_text(str(os.getpid()))
        time.sleep(60)

    def parent() -> None:
        multiprocessing.get_context("fork").Process(target=work).start()
        time.sleep(60)

    started = multiprocessing.get_context("fork").Process(target=parent)
    started.start()
    while not (mark.is_file() and mark.read_text()):
        time.sleep(0.05)
    worker = int(mark.read_text())
    started.kill()
    started.join()
    ends = time.monotonic() + 30
    while _is_alive(worker) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not _is_alive(worker)


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
