"""The command line: commands, recipes, overrides, and errors in one line."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import yaml
from PIL import Image

from diffkd.commands import cli
from diffkd.commands.arguments import values_of_fit

RECIPE = """
student: cifar/compact_resnet8
epochs: 2
data:
  class_path: diffkd.data.Arrays
  init_args: {{train: {folder}/train.npz, test: {folder}/test.npz, batch_size: 12}}
optimizer:
  class_path: torch.optim.AdamW
  init_args: {{lr: 0.01}}
schedule: {{kind: step, milestones: [1]}}
accelerator: cpu
progress: false
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    draw = np.random.default_rng(0)
    for name, count in (("train", 48), ("test", 24)):
        labels = np.arange(count) % 4
        images = (draw.integers(0, 80, (count, 16, 16, 1)) + 40 * labels[:, None, None, None]).astype(np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def teacher(recipe):
    """The folder of a finished run."""
    assert cli.main(["fit", str(recipe), f"--out={recipe.parent / 'teacher'}", "--seed=5"]) == 0
    return recipe.parent / "teacher"


def config_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def error_of(capsys):
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("diffkd: ")
    assert output.err.count("\n") == 1
    return output.err


def test_values_come_from_the_recipe_and_the_command_line(recipe, teacher):
    config = config_of(teacher)
    assert config["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert config["optimizer"]["init_args"]["lr"] == 0.01
    assert config["schedule"]["milestones"] == [1]
    assert config["seed"] == 5
    assert config["out"] == str(teacher)
    result = json.loads((teacher / "result.json").read_text())
    assert result["last"]["lr"] == pytest.approx(0.001)
    assert result["seed"] == 5


def test_a_method_and_its_options_on_the_command_line(recipe, teacher, tmp_path):
    words = ["fit", str(recipe), f"--out={tmp_path}", "--epochs=1", "--teacher=cifar/compact_resnet8"]
    words += [f"--teacher_weights={teacher}", "--method=diffkd.DiffKD", "--method.ae_channels=9"]
    words += ["--optimizer.lr=0.02", "--data.batch_size=24", "--ema=0.9"]
    assert cli.main(words) == 0
    config = config_of(tmp_path)
    (method,) = config["method"]
    assert method["init_args"]["ae_channels"] == 9
    assert config["optimizer"]["init_args"]["lr"] == 0.02
    assert config["data"]["init_args"]["batch_size"] == 24
    last = json.loads((tmp_path / "result.json").read_text())["last"]
    assert last["train/output/reconstruction"] > 0
    assert last["step"] == 2


def test_pairs_and_several_methods_in_a_file(recipe, teacher, tmp_path):
    extra = {
        "teacher": "cifar/compact_resnet8",
        "teacher_weights": str(teacher),
        "pairs": [
            {"student": "layer2", "method": {"class_path": "diffkd.DiffKD", "init_args": {"ae_channels": 4}}},
            {"student": "output", "method": "diffkd.DIST", "weight": 2.0},
        ],
    }
    (tmp_path / "extra.yaml").write_text(yaml.safe_dump(extra))
    words = ["fit", str(recipe), f"--config={tmp_path / 'extra.yaml'}", f"--out={tmp_path / 'run'}", "--epochs=1"]
    assert cli.main(words) == 0
    last = json.loads((tmp_path / "run" / "result.json").read_text())["last"]
    assert {"train/layer2/reconstruction", "train/output/kd"} <= last.keys()
    assert "train/output/reconstruction" not in last
    # The recorded values are a recipe themselves.
    assert cli.main(["fit", str(tmp_path / "run" / "config.yaml"), "--resume"]) == 0


def test_a_finished_run_is_tested_and_exported(teacher, tmp_path, capsys):
    result = json.loads((teacher / "result.json").read_text())
    assert cli.main(["test", str(teacher), "--accelerator=cpu"]) == 0
    shown = f"{100 * result['last']['top1']:.2f} %"
    assert f"top1  {shown}  (recorded {shown}, last epoch)" in capsys.readouterr().out
    assert cli.main(["export", str(teacher), f"--out={tmp_path / 'plain.safetensors'}"]) == 0
    assert (tmp_path / "plain.json").exists()
    other = teacher.parent / "test.npz"
    words = ["test", str(tmp_path / "plain.safetensors"), "--data=diffkd.data.Arrays", f"--data.train={other}"]
    assert cli.main([*words, f"--data.test={other}", "--accelerator=cpu"]) == 0
    assert shown in capsys.readouterr().out


def test_values_of_the_data_can_be_changed_for_a_test(teacher, capsys):
    result = json.loads((teacher / "result.json").read_text())
    train = teacher.parent / "train.npz"
    assert cli.main(["test", str(teacher), f"--data.test={train}", "--data.batch_size", "5", "--accelerator=cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"(recorded {100 * result['last']['top1']:.2f} %, last epoch)" in shown
    hits = 48 * float(shown.split("top1")[1].split()[0]) / 100
    assert hits == pytest.approx(round(hits), abs=0.01)  # of the 48 training images, not of the 24 others
    assert cli.main(["test", str(teacher), "--data.batch=5"]) == 2
    assert "nearest: batch_size" in error_of(capsys)
    for words in ([], ["--model=cifar/compact_resnet8"]):
        assert cli.main(["test", str(teacher / "checkpoints" / "last.ckpt"), *words]) == 1
        assert "diffkd export" in error_of(capsys)


def test_layers(capsys):
    assert (
        cli.main(["layers", "cifar/compact_resnet8", "--teacher", "cifar/compact_resnet14", "--method=diffkd.KD"]) == 0
    )
    output = capsys.readouterr().out
    assert "output" in output
    assert "layer3" not in output


def test_resolved_values_can_be_printed(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["fit", str(recipe), f"--out={tmp_path / 'x'}", "--print_config"])
    assert done.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["optimizer"]["init_args"]["lr"] == 0.01
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["fit", "test", "layers", "export", "recipes"])
def test_help_of_every_command(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: diffkd {command}")
    assert "known subclasses" not in text
    assert len(text) < 18_000  # a list of the known subclasses would double it


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ("fit", "test", "layers", "export", "recipes"))
    assert max(map(len, text.splitlines())) <= 80
    assert cli.main([]) == 2


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train"], 2, "no command 'train'"),
        (["fit"], 2, "required"),
        (["fit", "cifar100/resnet56-resnet"], 1, "nearest: cifar100/resnet56-resnet20"),
        (["fit", "--student=a", "--out=b", "--data=Nothing"], 2, "Nothing"),
        (["fit", "--epochs=many"], 2, "epochs"),
        (["test", "nowhere"], 1, "nowhere"),
        (["export", "nowhere"], 1, "nowhere"),
        (["layers", "cifar/resnet21"], 1, "resnet20"),
        (["layers", "cifar/resnet20", "--image_size=1.5"], 2, "image_size"),
        (["layers", "cifar/resnet20", "--image_size=0"], 1, "cannot take an example"),
    ],
)
def test_errors_are_one_line(words, code, message, capsys):
    assert cli.main(words) == code
    assert message in error_of(capsys)


FIT = ["fit", "--student=a", "--out=b", "--data=ImageFolder"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--data=ImageFoldr"], "--data: there is no 'ImageFoldr'; nearest: ImageFolder"),
        ([*FIT], "required, but not given: --data.root"),
        ([*FIT, "--data.rot=c"], "--data.rot: ImageFolder has no option 'rot'; nearest: root"),
        ([*FIT, "--data.batch_size=x"], "--data.batch_size: 'x' is not a whole number"),
        ([*FIT, "--data.on_bad_image=no"], "--data.on_bad_image: 'no' is not one of 'error', 'skip'"),
        ([*FIT, "--data.root", "--epochs=3"], "--data.root: give its value after it"),
        (["fit", "--data.root=c"], "--data.root: say first what --data is"),
        (["fit", "--method=kd"], "--method: there is no 'kd'; nearest: KD"),
        (["fit", "--method=diffkd.DiffKDD"], "there is no diffkd.DiffKDD; nearest: diffkd.DiffKD"),
        (["fit", "--method=[diffkd.KD, diffkd.DISTT]"], "there is no diffkd.DISTT; nearest: diffkd.DIST"),
        (["fit", "--method=nowhere.at.All"], "--method: No module named 'nowhere'; write"),
        (["fit", "--method=own/nets.py:Mine"], "write nets.Mine, and put its folder on PYTHONPATH: PYTHONPATH=own "),
        (["fit", "--method=nets:Mine"], "write nets.Mine, and put its folder on PYTHONPATH: PYTHONPATH=. "),
        (["fit", "--optimizer=nets.py:Mine"], "--optimizer: write nets.Mine, and"),
        (["fit", "--data=nets.py:Mine"], "--data: write nets.Mine, and"),
        (["fit", "--method=diffkd.DiffKD", "--method.ae_chanels=8"], "nearest: ae_channels"),
        (["fit", "--method=diffkd.DiffKD", "--method.ae_channels=x"], "'x' is not a whole number or null"),
        (["fit", "--pairs=[{student: a, weight: x}]"], "--pairs[0].weight: 'x' is not a number"),
        (["fit", "--pairs=[5]"], "--pairs: 5 is no Pair"),
        (["fit", "--pairs=[{student: a, method: 5}]"], "--pairs[0].method: 5 names no class"),
        (
            ["fit", "--pairs=[{student: a, method: {class_path: diffkd.KD, init_args: {temprature: 3}}}]"],
            "--pairs[0].method.temprature of diffkd.KD: KD has no option 'temprature'; nearest: temperature",
        ),
        (["fit", "--optimizer=Adamm"], "--optimizer: there is no 'Adamm'; nearest: Adam"),
        (["fit", "--optimizer.lr=x"], "--optimizer.lr: 'x' is not a number"),
        (["fit", "--segmentation.window=5"], "--segmentation.window: 5 is no list of 2"),
        (["fit", "--schedule=cosine"], "give its values one by one: --schedule.kind"),
        ([*FIT, "--data.root=c", "--epoks=3"], "there is no option --epoks; nearest: --epochs"),
        ([*FIT, "--data.root=c", "stray"], "nothing is known of 'stray'"),
        (["test", "run", "--wich=best"], "there is no option --wich; nearest: --which"),
    ],
)
def test_misspelt_words_are_named_with_the_nearest(words, message, capsys):
    assert cli.main(words) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"epochs: [3", "cannot be read as YAML (while parsing"),
        (b"epochs: \xff", "cannot be read as YAML"),
        (b"", "holds no values by name"),
        (b"- epochs", "holds no values by name"),
    ],
)
def test_a_file_without_values_is_named(tmp_path, capsys, text, reason):
    (tmp_path / "broken.yaml").write_bytes(text)
    for words in ([f"{tmp_path}/broken.yaml"], ["--config", f"{tmp_path}/broken.yaml"]):
        assert cli.main(["fit", *words]) == 2
        assert error_of(capsys).startswith(f"diffkd: {tmp_path}/broken.yaml {reason}")


@pytest.mark.parametrize(
    ("words", "devices"), [(["2"], 2), (["0", "1"], [0, 1]), (["[1]"], [1]), (["auto"], "auto"), (["-1"], -1)]
)
def test_one_number_of_devices_is_how_many(recipe, tmp_path, capsys, words, devices):
    with pytest.raises(SystemExit):
        cli.main(["fit", str(recipe), f"--out={tmp_path / 'x'}", "--devices", *words, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["devices"] == devices


@pytest.mark.parametrize("words", [["--out=~/run"], ["--out", "~/run"], ["--config=~/out.yaml"]])
def test_the_home_folder_is_found(recipe, tmp_path, monkeypatch, words):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "out.yaml").write_text("out: ~/run\n")
    assert cli.main(["fit", str(recipe), "--epochs=1", *words]) == 0
    assert (tmp_path / "home" / "run" / "result.json").is_file()
    assert (tmp_path / "home" / "run" / "tensorboard").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_switches_of_a_part_may_stand_alone(recipe, tmp_path, capsys):
    words = ["fit", str(recipe), f"--out={tmp_path / 'x'}", "--segmentation.auxiliary", "--data.augmentation.flip"]
    with pytest.raises(SystemExit):
        cli.main([*words, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["segmentation"]["auxiliary"] is True
    assert shown["data"]["init_args"]["augmentation"]["flip"] is True


def test_errors_of_a_run_are_one_line(recipe, teacher, tmp_path, capsys):
    assert cli.main(["fit", str(recipe), f"--out={teacher}"]) == 1
    assert "--resume" in error_of(capsys)
    assert cli.main(["fit", str(recipe), f"--out={teacher}", "--resume", "--epochs=7", "--seed=5"]) == 1
    assert "epochs is 2 there, 7 here" in error_of(capsys)
    missing = tmp_path / "missing.npz"
    assert cli.main(["fit", str(recipe), f"--out={tmp_path / 'a'}", f"--data.train={missing}"]) == 1
    assert "missing.npz" in error_of(capsys)
    assert cli.main(["fit", str(recipe), f"--out={tmp_path / 'a'}", "--optimizer.lr=1e30"]) == 1
    assert "not finite at step" in error_of(capsys)
    assert cli.main(["fit", str(recipe), f"--out={tmp_path / 'b'}", "--schedule.factor=-1"]) in (1, 2)
    assert "factor" in error_of(capsys)
    assert cli.main(["fit", str(recipe), f"--out={tmp_path / 'b'}", "--precision=17"]) == 1
    assert "17" in error_of(capsys)
    assert cli.main(["fit", str(recipe), f"--out={tmp_path / 'b'}", "--accelerator=abacus"]) == 1
    assert "abacus" in error_of(capsys)


def test_a_broken_image_is_named_without_a_traceback(tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (20, 16)).save(tmp_path / split / name / f"{index}.png")
    broken = tmp_path / "train" / "b" / "0.png"
    broken.write_bytes(broken.read_bytes()[:50])
    words = ["fit", "--student=cifar/compact_resnet8", "--data=ImageFolder", f"--data.root={tmp_path}"]
    words += ["--data.image_size=16", "--data.num_workers=1", "--accelerator=cpu", "--epochs=1", "--progress=false"]
    assert cli.main([*words, f"--out={tmp_path / 'run'}"]) == 1
    assert error_of(capsys).startswith(f"diffkd: image {broken} cannot be read")


def test_warnings_are_shown_without_the_code_they_come_from(monkeypatch, capsys):
    def warn(words):
        for file in (cli.__file__, "elsewhere.py"):
            warnings.warn_explicit("2 boxes are left out", UserWarning, file, 7)

    monkeypatch.setattr(cli, "_commands", lambda: {"warn": warn})
    monkeypatch.setattr(warnings, "showwarning", lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4])))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["warn"]) == 0
    ours, theirs = capsys.readouterr().err.splitlines()
    assert ours == "diffkd: warning: 2 boxes are left out"
    assert theirs == "elsewhere.py:7: UserWarning: 2 boxes are left out"


def test_a_traceback_can_be_asked_for(monkeypatch):
    with pytest.raises(FileNotFoundError):
        cli.main(["test", "nowhere", "--traceback"])
    monkeypatch.setenv("DIFFKD_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["test", "nowhere"])


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["fit"]) == 1
    assert "pip install 'diffkd[train]'" in error_of(capsys)


def test_a_run_is_resumed_where_it_lies_now(teacher, tmp_path, monkeypatch, capsys):
    shutil.copytree(teacher, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    recorded = config_of(teacher)
    (tmp_path / "moved" / "config.yaml").write_text(yaml.safe_dump(recorded | {"out": "before", "progress": True}))
    assert cli.main(["fit", "moved/config.yaml", "--resume"]) == 0
    assert "moved is finished" in capsys.readouterr().err
    assert not (tmp_path / "before").exists()


def test_interrupted_from_outside_and_resumed(recipe, tmp_path):
    """A process of its own, stopped by a signal as a scheduler stops it."""
    run = tmp_path / "run"
    words = ["fit", str(recipe), f"--out={run}", "--epochs=100000", "--save_every_steps=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "diffkd.commands.cli", *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    (line,) = errors.strip().splitlines()[-1:]
    assert line.startswith("diffkd: stopped after step")
    resume = line[line.index("diffkd fit") :].split()[1:]
    assert resume == ["fit", str(run / "config.yaml"), "--resume"]
    assert cli.main([*resume, "--epochs=3"]) == 1  # other values


def test_a_reader_that_has_seen_enough_is_no_error():
    words = f"{sys.executable} -m diffkd recipes | head -1"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("bccd/")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["fit", "--lr", "0.1"], "it is --optimizer.lr"),
        (["fit", "--learning_rate=0.1"], "it is --optimizer.lr"),
        (["fit", "--batch_size", "8"], "it is --data.batch_size"),
        (["compare", "demo", "--method", "kd", "--out", "there"], "no option --method; nearest: --methods"),
        (["layers", "smp/unet/resnet18"], "--task segmentation"),
        (["layers", "retinanet/resnet18"], "--task detection"),
    ],
)
def test_options_under_their_names_elsewhere_are_pointed_to(words, meant, capsys):
    assert cli.main(words) != 0
    assert meant in capsys.readouterr().err


def test_more_runs_than_can_be_meant_are_refused_before_they_are_listed(tmp_path, capsys):
    words = ["compare", "cifar100/resnet56-resnet20", f"--out={tmp_path / 'table'}", "--seeds=1000000000"]
    assert cli.main(words) == 1
    assert "give fewer --seeds" in capsys.readouterr().err


def test_the_home_folder_is_found_in_values_of_a_file(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(recipe.parent))
    values = yaml.safe_load(recipe.read_text())
    values["data"]["init_args"] |= {"train": "~/train.npz", "test": "~/test.npz"}
    (tmp_path / "home.yaml").write_text(yaml.safe_dump(values))
    recorded = values_of_fit([str(tmp_path / "home.yaml"), f"--out={tmp_path / 'run'}"])
    assert recorded["data"]["init_args"]["train"] == str(recipe.parent / "train.npz")


def test_names_that_the_output_cannot_encode_are_escaped(tmp_path, monkeypatch):
    """As on a console of Windows; a measurement must not be lost for it."""
    (tmp_path / "data.yaml").write_text("names: [\u72d7, cat]", encoding="utf-8")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["inspect", str(tmp_path / "data.yaml")]) == 0
    sys.stdout.flush()
    assert b"\\u72d7, cat" in written.getvalue()


def test_a_word_as_long_as_a_file_is_shortened(capsys):
    """As a name in an archive or a table may be; the start and the end of it say which."""
    assert cli.main(["inspect", f"first{'x' * 100_000}last"]) == 1
    message = capsys.readouterr().err
    assert len(message) < 1_000
    assert "first" in message
    assert "last" in message
