"""What a file may name: nothing that it names runs unless it is of the known packages and of the right kind."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file
from tiny_recipe import MODELS, TRUST, write_recipe

from diffkd.commands import cli
from diffkd.commands.arguments import fit_arguments, fit_with, values_of_fit
from diffkd.commands.compare import compare
from diffkd.commands.evaluate import described_data, evaluate
from diffkd.commands.export import export
from diffkd.files.config import class_path
from diffkd.recipes import find_recipe, recipe_names
from diffkd.recipes.trust import Gate, Trust, UsageError, named_code, own_code, take_trust
from diffkd.training.checkpointing import Saver

BASE = """
student: cifar/compact_resnet8
teacher: cifar/compact_resnet14
out: unused
data: {class_path: diffkd.data.FashionSubset}
"""
EVIL = """
from pathlib import Path
from torch import nn
from torch.optim import SGD
from lightning.pytorch import LightningDataModule
Path("imported").touch()

def payload(*args, **kwargs):
    Path("called").touch()

class Method(nn.Module):
    def __init__(self, *args, **kwargs):
        Path("called").touch()

class Optimizer(SGD):
    def __init__(self, *args, **kwargs):
        Path("called").touch()

class Data(LightningDataModule):
    def __init__(self):
        Path("called").touch()
"""
MINE = """
import os
import shutil
import torch
from diffkd.data import FashionSubset
from torch import nn

class Mine(nn.Module):
    wants = frozenset({"feature"})

    def __init__(self, student, teacher, scale=1, note=None):
        super().__init__()
        self.project = nn.Conv2d(student.channels, teacher.channels, 1)
        self.scale = scale

    def forward(self, student, teacher):
        return {"own": self.scale * (self.project(student) - teacher).square().mean()}

class MyOptim(torch.optim.SGD):
    pass

class MyData(FashionSubset):
    pass

def denoise(channels: int, is_map: bool) -> nn.Module:
    return nn.Identity()
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Work in an empty folder, with modules of the user's own, and of somebody else's, on the path."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "evil_code.py").write_text(EVIL, encoding="utf-8")
    (folder / "mine_code.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    yield
    for name in ("evil_code", "mine_code"):
        sys.modules.pop(name, None)


def write(name, text, base=BASE):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(yaml.safe_dump(yaml.safe_load(base) | yaml.safe_load(text)), encoding="utf-8")
    return name


def nothing_ran():
    marks = {"imported", "called", "pwned"}
    return marks.isdisjoint(os.listdir()) and "evil_code" not in sys.modules  # noqa: PTH208


def refused(capsys, words, *parts):
    """Assert that words are refused in one line that has these parts, and that nothing ran."""
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert nothing_ran()
    assert error.startswith("diffkd: ")
    assert error.count("\n") == 1
    assert not [part for part in parts if part not in error], error


SHELL = "init_args: {command: touch pwned}"
PAIR = "[{student: layer2}, {student: layer3, method: %s}]"
IN_DIFFKD = "{class_path: diffkd.DiffKD, init_args: {%s}}"
HOSTILE = [
    # What the option is named in the message, its value in the file, what it names.
    ("student", "os:system", "os:system"),
    ("student", "evil_code:payload", "evil_code:payload"),
    ("student", "modules/evil_code.py:payload", "modules/evil_code.py:payload"),
    ("teacher", "modules/evil_code.py:payload", "modules/evil_code.py:payload"),
    ("optimizer", "os.system", "os.system"),
    ("optimizer", "{class_path: os.system, init_args: {command: touch pwned}}", "os.system"),
    ("optimizer", "'{class_path: os.system, init_args: {command: touch pwned}}'", "os.system"),
    ("optimizer", "{class_path: os.makedirs, init_args: {name: pwned}}", "os.makedirs"),
    ("optimizer", "{class_path: builtins.exec}", "builtins.exec"),
    ("optimizer", "{class_path: functools.partial}", "functools.partial"),
    ("optimizer", "{class_path: subprocess.Popen, init_args: {args: [touch, pwned]}}", "subprocess.Popen"),
    ("optimizer", "{class_path: evil_code.Optimizer}", "evil_code.Optimizer"),
    ("optimizer", "{class_path: torch.os.system, init_args: {command: touch pwned}}", "torch.os.system"),
    (
        "optimizer",
        "{class_path: diffkd.commands.cli.os.system, init_args: {command: touch pwned}}",
        "diffkd.commands.cli.os.system",
    ),
    ("optimizer", "{class_path: torch.hub.load}", "torch.hub.load"),
    ("optimizer", "{class_path: torch.nn.Linear}", "torch.nn.Linear"),
    ("optimizer", "{class_path: diffkd.__main__.main}", "diffkd.__main__.main"),
    ("optimizer.lr", "{class_path: torch.optim.SGD, init_args: {lr: evil_code.payload}}", "evil_code.payload"),
    (
        "optimizer.x",
        "{class_path: torch.optim.SGD, dict_kwargs: {x: {class_path: os.system, init_args: {command: touch pwned}}}}",
        "os.system",
    ),
    (
        "optimizer.optimizer_class",
        "{class_path: torch.distributed.optim.ZeroRedundancyOptimizer, init_args: {optimizer_class: evil_code.A}}",
        "evil_code.A",
    ),
    ("method", "os.system", "os.system"),
    ("method", "evil_code.Method", "evil_code.Method"),
    ("method[1]", "[diffkd.KD, evil_code.Method]", "evil_code.Method"),
    ("method[0]", "[{class_path: os.makedirs, init_args: {name: pwned}}]", "os.makedirs"),
    (
        "method",
        "{class_path: torch.utils.tensorboard.SummaryWriter, init_args: {log_dir: pwned}}",
        "torch.utils.tensorboard.SummaryWriter",
    ),
    ("method", "torch.optim.SGD", "torch.optim.SGD"),
    (
        "method.activation",
        "{class_path: torch.nn.TransformerEncoderLayer, init_args: {activation: evil_code.payload}}",
        "evil_code.payload",
    ),
    ("pairs[1].method", PAIR % "os.system", "os.system"),
    ("pairs[1].method", PAIR % "{class_path: evil_code.payload}", "evil_code.payload"),
    ("pairs[1].method.denoiser", PAIR % IN_DIFFKD % "denoiser: os.makedirs", "os.makedirs"),
    ("pairs[0].ramp", "[{student: a, ramp: evil_code.payload}]", "evil_code.payload"),
    ("pairs[0].student_layout", "[{student: a, student_layout: evil_code.payload}]", "evil_code.payload"),
    ("method.denoiser", IN_DIFFKD % "denoiser: os.system", "os.system"),
    ("method.denoiser", IN_DIFFKD % "denoiser: evil_code.payload", "evil_code.payload"),
    ("method.denoiser", IN_DIFFKD % "denoiser: torch.hub.load", "torch.hub.load"),
    ("method.denoiser", IN_DIFFKD % "denoiser: {class_path: evil_code.Method}", "evil_code.Method"),
    ("method.distance", IN_DIFFKD % "distance: os.system", "os.system"),
    ("method.distance", IN_DIFFKD % "distance: evil_code.payload", "evil_code.payload"),
    ("method.logits_distance", IN_DIFFKD % "logits_distance: torch.save", "torch.save"),
    ("data", "os.system", "os.system"),
    ("data", "{class_path: evil_code.Data}", "evil_code.Data"),
    (
        "data",
        "{class_path: diffkd.files.weights.os.system, init_args: {command: touch pwned}}",
        "diffkd.files.weights.os.system",
    ),
    ("data", "{class_path: diffkd.data.DeviceLoader}", "diffkd.data.DeviceLoader"),
    ("data", "{class_path: torch.utils.data.DataLoader}", "torch.utils.data.DataLoader"),
    (
        "data.augmentation",
        "{class_path: diffkd.data.ImageFolder, init_args: {root: a, augmentation: evil_code.payload}}",
        "evil_code.payload",
    ),
    (
        "data.augmentation",
        "{class_path: diffkd.data.ImageFolder, init_args: {augmentation: {class_path: os.system, init_args: {}}}}",
        "os.system",
    ),
    ("schedule", "evil_code.payload", "evil_code.payload"),
    ("schedule", "{class_path: evil_code.payload}", "evil_code.payload"),
    ("method_ramp", "{class_path: evil_code.payload}", "evil_code.payload"),
    ("anything", "{class_path: os.system, init_args: {command: touch pwned}}", "os.system"),
]


@pytest.mark.parametrize(("where", "text", "name"), HOSTILE)
def test_a_recipe_runs_nothing(capsys, where, text, name):
    option = where.partition(".")[0].partition("[")[0]
    write("recipe.yaml", f"{option}: {text}")
    parts = [f"recipe.yaml: {where} names {name!r}, "]
    if name.startswith(("evil_code", "modules/")):
        code = name.partition(":")[0] if ":" in name else "evil_code"
        parts.append(f"a file is data, and runs no other code: if you trust it, add --trust {code}")
    else:
        parts.append("name ")
    refused(capsys, ["fit", "recipe.yaml"], *parts)


@pytest.mark.parametrize(
    "text",
    [
        f"optimizer.class_path: os.system\noptimizer.init_args.command: touch pwned\n{BASE}",
        f"method+: [evil_code.payload]\n{BASE}",
        f"optimizer: {{class_path: torch.optim.SGD, init_args: {{lr.class_path: evil_code.payload}}}}\n{BASE}",
        f"x: &a {{class_path: os.system, {SHELL}}}\noptimizer: {{<<: *a}}\n{BASE}",
        f"method: &a [*a]\n{BASE}",
        f"method: !!python/object/apply:os.system ['touch pwned']\n{BASE}",
        f"config: more.yaml\n{BASE}",
        f"trust: [evil_code]\nmethod: evil_code.Method\n{BASE}",
        f"schedule: more.yaml\n{BASE}",
        f"schedule: recipe.yaml\n{BASE}",
        f"pairs: [{{student: a, ramp: more.yaml}}]\n{BASE}",
        "data: {class_path: diffkd.data.ImageFolder, init_args: {root: a, augmentation: more.yaml}}\nstudent: a",
    ],
)
def test_tricks_of_files_run_nothing(capsys, text):
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    Path("more.yaml").write_text(f"class_path: evil_code.payload\noptimizer: {{class_path: os.system, {SHELL}}}")
    refused(capsys, ["fit", "recipe.yaml"], ".yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["--config=evil.yaml"],
        ["--config", "evil.yaml"],
        ["--schedule=part.yaml"],
        ["--data", "diffkd.data.ImageFolder", "--data.augmentation", "part.yaml"],
        ["--data=ImageFolder", "--data.augmentation=part.yaml"],
        ["--optimizer=part.yaml"],
        ["--data=part.yaml"],
        ["--pairs=part.yaml"],
    ],
)
def test_files_of_values_on_the_command_line_run_nothing(capsys, words):
    write("recipe.yaml", "{}")
    Path("evil.yaml").write_text("method: [diffkd.KD, evil_code.Method]\n")
    Path("part.yaml").write_text("class_path: evil_code.payload\n")
    refused(
        capsys, ["fit", "recipe.yaml", *words], f"names 'evil_code.{'Method' if 'evil' in words[-1] else 'payload'}'"
    )
    refused(capsys, ["fit", *words, "recipe.yaml"], "names 'evil_code.")


def test_options_that_are_cut_short_read_no_file(capsys):
    Path("evil.yaml").write_text("method: evil_code.Method\n")
    refused(capsys, ["fit", "--conf=evil.yaml"], "there is no option --conf; nearest: --config")
    refused(capsys, ["fit", "--config=/dev/stdin"], "save it as a file first")
    refused(capsys, ["fit", "--config=-"], "save it as a file first")


def test_the_configuration_of_a_run_says_how_to_resume(capsys):
    write("run/config.yaml", "method: evil_code.Method")
    words = ["fit", "run/config.yaml", "--resume"]
    refused(capsys, words, "run/config.yaml: method names", "diffkd fit run/config.yaml --resume --trust evil_code")
    Path("run/metrics.csv").touch()
    Path("run/checkpoints").mkdir()
    Path("run/checkpoints/last.ckpt").touch()
    refused(capsys, ["plot", "run"], "run/config.yaml: method names 'evil_code.Method'", "--trust evil_code")


def test_a_comparison_runs_nothing(capsys):
    write("recipe.yaml", "method: diffkd.KD")
    Path("evil.yaml").write_text("method: evil_code.Method\n")
    refused(capsys, ["compare", "recipe.yaml", "--methods", "kd", "evil.yaml", "--out=out"], "evil.yaml: method names")
    write("recipe.yaml", "optimizer: evil_code.Optimizer")
    refused(capsys, ["compare", "recipe.yaml", "--out=out"], "recipe.yaml: optimizer names", "--trust evil_code")
    assert not Path("out").exists()


CARD = {"model": "cifar/compact_resnet8", "num_classes": 10, "in_channels": 1, "image_size": [32, 32]}


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        ({"model": "evil_code:payload"}, "--trust evil_code"),
        ({"model": "modules/evil_code.py:payload"}, "--trust modules/evil_code.py"),
        ({"data": {"class_path": "evil_code.Data"}}, "--trust evil_code"),
        ({"data": {"class_path": "diffkd.data.os", "init_args": {}}}, "give --data"),
    ],
)
def test_a_card_runs_nothing(capsys, change, mend):
    import torch

    save_file({"weight": torch.ones(1)}, "s.safetensors")
    data = {"data": {"class_path": "diffkd.data.FashionSubset"}}
    Path("s.json").write_text(json.dumps(CARD | data | change))
    with pytest.raises(ValueError, match=mend):
        evaluate("s.safetensors")
    if "model" in change:
        with pytest.raises(ValueError, match=mend):
            export("s.safetensors", "s.onnx")
    assert nothing_ran()


@pytest.mark.parametrize("value", ["evil_code.payload", {"class_path": "os.system"}, "{class_path: os.system}"])
def test_a_card_whose_data_are_changed_on_the_command_line_runs_nothing(capsys, value):
    import torch

    save_file({"weight": torch.ones(1)}, "s.safetensors")
    data = {"class_path": "diffkd.data.FashionSubset", "init_args": {"augmentation": value}}
    Path("s.json").write_text(json.dumps(CARD | {"data": data}))
    refused(capsys, ["test", "s.safetensors", "--data.batch_size=5"], "s.json: data.augmentation names")


@pytest.mark.parametrize(
    "words",
    [
        ["--trust=mine_code"],
        ["--trust", "modules/mine_code.py"],
        ["--trust", "modules/mine_code.py", "--trust", "another"],
        ["--student=modules/mine_code.py:denoise"],
        ["--method.scale=2", "--method=mine_code.Mine"],
        ["--pairs=[{student: layer3, method: {class_path: mine_code.Mine}}]", "--method=null"],
        ["--config={method: mine_code.Mine}"],
        ["--optimizer", "mine_code.MyOptim"],
        ["--data=mine_code.MyData"],
    ],
)
def test_own_code_is_believed_where_the_command_line_names_it(words):
    write("recipe.yaml", "method: {class_path: mine_code.Mine, init_args: {scale: 2}}")
    if "--method=mine_code.Mine" in words:
        words = [words[1], words[0]]
    values_of_fit(["recipe.yaml", *words])
    assert "mine_code" in sys.modules


def test_everything_of_a_trusted_module_may_be_named():
    write(
        "recipe.yaml",
        """
        method:
        - {class_path: mine_code.Mine, init_args: {note: {class_path: mine_code.Mine}}}
        - class_path: diffkd.DiffKD
          init_args: {denoiser: mine_code.denoise, distance: diffkd.diffusion.distances.mse}
        optimizer: {class_path: mine_code.MyOptim, init_args: {lr: 0.1}}
        data: {class_path: mine_code.MyData}
        student: modules/mine_code.py:denoise
        """,
    )
    found = values_of_fit(["recipe.yaml", "--trust=mine_code"])
    assert (found["data"]["class_path"], found["method"][0]["class_path"]) == ("mine_code.MyData", "mine_code.Mine")
    assert own_code(found) == ["modules/mine_code.py", "mine_code"]
    assert "trust" not in found


@pytest.mark.parametrize("name", ["mine_code.os.system", "mine_code.shutil.rmtree", "mine_code.os.PathLike"])
def test_what_a_trusted_module_has_imported_is_not_trusted(capsys, name):
    write("recipe.yaml", f"method: {{class_path: {name}}}")
    refused(capsys, ["fit", "recipe.yaml", "--trust=mine_code"], f"method names {name!r}, a", "below Module")


def test_names_to_trust_are_checked(capsys):
    refused(capsys, ["fit", "--trust=nowhere.py"], "--trust: there is no file nowhere.py; give")
    refused(capsys, ["fit", "--trust=os.path"], "os.path is a module of Python itself")
    refused(capsys, ["fit", "--trust"], "give a file or a module after it")
    assert take_trust(["a", "--trust", "mine", "--b", "--trust=other"]) == (["a", "--b"], ["mine", "other"])


def test_words_name_code_only_where_it_is_called():
    words = ["--data.train", "evil_code.npz", "--out=evil_code.x", "--student=timm/a", "--optimizer=torch.optim.SGD"]
    assert named_code(words) == []
    words = ["--method.denoiser=a.b", "--teacher", "c.py:d", "--pairs=[{student: x.y, method: e.f}]"]
    assert named_code(words) == ["a", "c.py", "e"]


def test_own_data_of_a_card_are_trusted_likewise():
    kind, arguments = described_data({"seed": 3, "data": {"class_path": "mine_code.MyData"}}, ["mine_code"])
    assert (kind.__module__, arguments) == ("mine_code", {"seed": 3})


def test_the_denoiser_of_the_benchmarks_is_named_with_trust():
    values = yaml.safe_load((Path(__file__).parents[2] / "benchmarks" / "diffkd-unet.yaml").read_text(encoding="utf-8"))
    Gate(fit_arguments(), Trust(["benchmarks.unet_denoiser"])).check(values, "diffkd-unet.yaml")
    with pytest.raises(UsageError, match=r"method\[0\]\.denoiser names .* --trust benchmarks\.unet_denoiser"):
        Gate(fit_arguments(), Trust()).check(values, "diffkd-unet.yaml")


@pytest.mark.usefixtures("short_comparisons")
def test_own_code_trains_resumes_compares_tests_and_plots(tmp_path, capsys, monkeypatch):
    recipe = write_recipe(tmp_path, epochs=1)
    method = "method: {class_path: mine_code.Mine, init_args: {scale: 0.5}}\n"
    recipe.write_text(recipe.read_text().replace("method: diffkd.DiffKD\n", method))
    trust = [TRUST, "--trust=mine_code"]
    hints = []

    class Hinting(Saver):
        def __init__(self, *args, how_to_resume, **kwargs):
            hints.append(how_to_resume)
            super().__init__(*args, how_to_resume=how_to_resume, **kwargs)

    monkeypatch.setattr("diffkd.training.fit.Saver", Hinting)
    result = fit_with([str(recipe), "--out=run", "--accelerator=cpu", "--progress=false", *trust])
    assert any(name.endswith("/own") for name in result["last"])
    assert hints == [f"Go on with: diffkd fit run/config.yaml --resume --trust {MODELS} --trust mine_code"]
    assert cli.main(hints[0].partition("diffkd ")[2].split()) == 0
    assert cli.main(["test", "run", TRUST, "--accelerator=cpu"]) == 0
    assert cli.main(["plot", "run", *trust, "--images=2", "--gammas=10"]) == 0
    assert cli.main(["test", "run"]) == 1
    assert f"--trust {MODELS}" in capsys.readouterr().err
    Path("other.yaml").write_text(method)
    options = ["--method", "mine_code.Mine", f"--student={MODELS}:small", "--max_steps=1"]  # which trust both
    trained = []

    def train_all(commands, jobs, console):  # not in processes of their own, which take their time
        trained.extend(fit_with(words) for words in commands.values())
        return []

    monkeypatch.setattr("diffkd.commands.compare.train_all", train_all)
    rows = compare(str(recipe), Path("out"), methods=["alone", "other.yaml"], seeds=1, cost=False, options=options)
    assert [row.method for row in rows] == ["alone", "other"]
    assert len(trained) == 2


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_package_name_nothing_else(name):
    Gate(fit_arguments(), Trust()).check(yaml.safe_load(find_recipe(name).read_text(encoding="utf-8")), name)


def test_names_that_runs_have_recorded_go_on_working():
    import timm.optim
    import torch

    from diffkd import DiffKD
    from diffkd.data import Arrays, MaskFolder

    gate = Gate(fit_arguments(), Trust())
    for kind in (Arrays, MaskFolder):
        gate.check({"data": {"class_path": class_path(kind), "init_args": {"train": "os.path", "root": "a"}}}, "x")
    for kind in (torch.optim.SGD, torch.optim.Muon, timm.optim.RMSpropTF):
        gate.check({"optimizer": {"class_path": class_path(kind), "init_args": {"lr": 0.1}}}, "x")
    gate.check({"method": class_path(DiffKD), "pairs": [{"student": "os.path", "method": "diffkd.DiffKD"}]}, "x")
    gate.check({"optimizer": "AdamW", "data": "FashionMNIST", "method": "KD", "out": "os.path"}, "x")
    with pytest.raises(UsageError):
        gate.check({"data": {"class_path": "diffkd.data.Arrays", "init_args": {"augmentation": "os.path"}}}, "x")
