"""`fit` from Python: what it leaves, and what it refuses."""

import csv
import gc
import io
import json
import weakref
from functools import partial

import pytest
import torch
from rich.console import Console
from rounding import EXACT
from short_trainings import METHODS, arrays, built, train
from tiny_models import large, small

from diffkd import DIST, KD, DiffKD, Distiller, FitNet, Pair, load_weights, read_weights
from diffkd.data import Arrays, Augmentation
from diffkd.distill.checks import GradientWarning
from diffkd.models import load_model
from diffkd.tasks.classification import Classification
from diffkd.tasks.data_facts import facts_of
from diffkd.training.callbacks import report
from diffkd.training.fit import fit
from diffkd.training.lightning_module import Training
from diffkd.training.optimization import Schedule
from diffkd.training.options import Teacher


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_files, model_file):
    """A finished run of three epochs with DiffKD and an average."""
    folder = tmp_path_factory.mktemp("run")
    result = train(
        arrays(image_files), folder, model_file, method=METHODS["diffkd"], ema=0.5, config={"epochs": 3, "ema": 0.5}
    )
    return folder, result


def test_the_folder_holds_everything(run):
    folder, result = run
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("tensorboard/events")}
    assert len(events) == 1
    assert names - events - {"tensorboard/hparams.yaml"} == {
        *("config.yaml", "metrics.csv", "result.json", "checkpoints/last.ckpt"),
        *("student.safetensors", "student.json", "best.safetensors", "best.json"),
    }
    assert json.loads((folder / "result.json").read_text()) == result


def test_the_result_names_last_and_best(run):
    folder, result = run
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert result["last"]["epoch"] == 3
    assert float(rows[-1]["top1"]) == result["last"]["top1"]
    assert result["best"]["top1"] == max(float(row["top1"]) for row in rows)
    assert result["parameters"] == sum(p.numel() for p in load_model_of(run).parameters())
    assert result["method_parameters"] > 0
    assert {"diffkd", "torch", "lightning"} <= result["versions"].keys()
    assert result["device"] == "1 x cpu"
    card = json.loads((folder / "student.json").read_text())
    assert card["metrics"]["top1"] == result["last"]["top1"]
    assert (card["which"], card["epoch"], card["num_classes"], card["in_channels"]) == ("last epoch", 3, 6, 3)


def load_model_of(run):
    card = json.loads((run[0] / "student.json").read_text())
    return load_model(card["model"], num_classes=card["num_classes"], in_channels=card["in_channels"])


def test_the_student_is_plain(run):
    model = load_model_of(run)
    assert read_weights(run[0] / "student.safetensors").keys() == model.state_dict().keys()
    load_weights(model, run[0] / "student.safetensors")


def test_the_average_is_what_is_saved(run):
    content = torch.load(run[0] / "checkpoints" / "last.ckpt", weights_only=True)
    saved = read_weights(run[0] / "student.safetensors")
    average = content["diffkd"]["average"]["model"]
    assert all(torch.equal(saved[name], average[name]) for name in average)
    assert not torch.equal(saved["4.weight"], content["state_dict"]["model.student.4.weight"])


def test_best_and_last_are_different_files(tmp_path, image_files, model_file):
    """The last epoch is made a bad one, by its learning rate."""
    spoil = Schedule("step", milestones=[4], factor=1000.0)
    optimizer = partial(torch.optim.AdamW, lr=0.02)
    result = train(arrays(image_files), tmp_path, model_file, epochs=5, schedule=spoil, optimizer=optimizer)
    assert result["best"]["top1"] > result["last"]["top1"]
    assert result["best"]["epoch"] <= 4
    for name, epoch in (("best", result["best"]["epoch"]), ("student", 5)):
        card = json.loads((tmp_path / f"{name}.json").read_text())
        assert card["epoch"] == epoch
        student = load_model(
            f"{model_file}:small", num_classes=6, in_channels=3, weights=tmp_path / f"{name}.safetensors"
        )
        data = arrays(image_files)
        hits = sum((student.eval()(images).argmax(1) == labels).sum() for images, labels, _ in data.val_dataloader())
        assert card["metrics"]["top1"] == pytest.approx(int(hits) / 36)


def test_the_initial_student_does_not_depend_on_the_method(tmp_path, image_files, model_file):
    frozen = partial(torch.optim.SGD, lr=0.0)
    for name, method in {"plain": None, "kd": KD, "diffkd": DiffKD}.items():
        train(arrays(image_files), tmp_path / name, model_file, method=method, optimizer=frozen, max_steps=1)
    first, *others = (read_weights(tmp_path / name / "student.safetensors") for name in ("plain", "kd", "diffkd"))
    for other in others:
        assert torch.equal(first["4.weight"], other["4.weight"])
        assert torch.equal(first["0.0.weight"], other["0.0.weight"])


def test_max_steps_ends_early_but_completely(tmp_path, image_files, model_file):
    result = train(arrays(image_files), tmp_path, model_file, max_steps=8)
    assert result["last"]["step"] == 8
    assert result["last"]["epoch"] == 2
    assert (tmp_path / "student.safetensors").exists()


@pytest.mark.parametrize(
    ("method", "pairs"),
    [
        (DIST, "auto"),
        ([FitNet, DIST], "auto"),
        (None, [Pair("0", method=DiffKD), Pair("output", method=KD)]),
        (KD, [Pair("output", weight=0.5)]),
    ],
)
def test_methods_and_pairs(tmp_path, image_files, model_file, method, pairs):
    fit(
        f"{model_file}:small",
        arrays(image_files),
        tmp_path,
        teacher=f"{model_file}:large",
        method=method,
        pairs=pairs,
        epochs=1,
        progress=False,
        accelerator="cpu",
    )
    assert any(name.endswith("/kd") for name in json.loads((tmp_path / "result.json").read_text())["last"])
    config = (tmp_path / "config.yaml").read_text()
    assert "resume" not in config
    assert "epochs: 1" in config


def test_a_run_teaches_the_next_even_with_other_statistics(tmp_path, image_files):
    """The teacher's card says how its images were normalised."""
    data = Arrays(image_files["train"], image_files["test"], batch_size=10, mean=(0.1,) * 3, std=(0.3,) * 3)
    options = {"progress": False, "accelerator": "cpu", "epochs": 1}
    fit("cifar/compact_resnet8", data, tmp_path / "teacher", **options)
    taught = fit(
        "cifar/compact_resnet8",
        arrays(image_files),
        tmp_path / "student",
        teacher="cifar/compact_resnet8",
        teacher_weights=str(tmp_path / "teacher"),
        method=KD,
        **options,
    )
    assert taught["last"]["train/output/kd"] >= 0


def test_teaching_needs_both_sides(tmp_path, image_files, model_file):
    data = arrays(image_files)
    with pytest.raises(ValueError, match="needs a teacher"):
        fit(f"{model_file}:small", data, tmp_path, method=KD)
    with pytest.raises(ValueError, match="needs a method"):
        fit(f"{model_file}:small", data, tmp_path, teacher=f"{model_file}:large")
    with pytest.raises(ValueError, match="has no weights"):
        fit("cifar/resnet8", data, tmp_path, teacher="cifar/resnet20", method=KD, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("clip", [-3.0, 0.0, float("nan")])
def test_a_norm_that_would_not_clip_is_refused(tmp_path, image_files, model_file, clip):
    with pytest.raises(ValueError, match=f"gradient_clip={clip} .* above 0, or leave it out"):
        train(arrays(image_files), tmp_path / "run", model_file, gradient_clip=clip)
    assert not (tmp_path / "run").exists()


def test_a_seed_that_no_generator_takes_is_refused(tmp_path, image_files, model_file):
    with pytest.raises(ValueError, match=f"seed={10**20} does not fit into 64 bits"):
        train(arrays(image_files), tmp_path / "run", model_file, seed=10**20)


def test_a_run_whose_pair_learns_nothing_is_refused(tmp_path, image_files):
    file = tmp_path / "models.py"
    file.write_text(
        "from tiny_models import large, small as whole\n"
        "def small(num_classes, in_channels):\n"
        "    net = whole(num_classes, in_channels)\n"
        "    net[0].requires_grad_(False)\n"
        "    return net\n"
    )
    with (
        pytest.warns(GradientWarning),
        pytest.raises(ValueError, match=r"pair '0': the output of the student's '0' carries no gradient.*unfreeze"),
    ):
        train(arrays(image_files), tmp_path / "run", str(file), method=FitNet)


def test_modules_in_place_of_names_are_refused_at_once(tmp_path, image_files, model_file):
    data, net, name = arrays(image_files), small(6, 3), f"{model_file}:small"
    own_loop = r"name is wanted, .*own\.module:function .* diffkd\.Distiller in a loop of your own"
    with pytest.raises(TypeError, match=f"student is a Sequential, and a {own_loop}"):
        fit(net, data, tmp_path / "run")
    with pytest.raises(TypeError, match=f"teacher is a Sequential, and a {own_loop}"):
        fit(name, data, tmp_path / "run", teacher=net, method=KD)
    with pytest.raises(TypeError, match=f"teacher is a Sequential, and a {own_loop}"):
        fit(name, data, tmp_path / "run", teacher=[f"{model_file}:large", net], method=KD)
    with pytest.raises(TypeError, match=f"the teacher is a Sequential, and a {own_loop}"):
        Teacher(net)
    assert not (tmp_path / "run").exists()


def test_a_failed_start_leaves_no_obstacle(tmp_path, image_files, model_file):
    with pytest.raises(FloatingPointError):
        train(arrays(image_files), tmp_path, model_file, optimizer=partial(torch.optim.SGD, lr=1e30))
    train(arrays(image_files), tmp_path, model_file, config={"other": 1}, epochs=1)


def test_mixup_of_the_data_reaches_the_task(image_files):
    facts = facts_of(arrays(image_files, augmentation=Augmentation(mixup=0.2, cutmix=1.0)))
    assert (facts.mixup, facts.cutmix) == (0.2, 1.0)


def test_data_without_facts_are_refused(image_files):
    data = arrays(image_files)
    del data.classes
    with pytest.raises(ValueError, match="Arrays has no classes"):
        facts_of(data)


def test_the_report_warns_of_an_ignorant_teacher():
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([2, 2, 2, 5])

    def printed(answer, warmup=0):
        teacher = large(6, 3)  # always says the same class
        with torch.no_grad():
            teacher[4].weight.zero_()
            teacher[4].bias.copy_(9 * torch.eye(6)[answer])
        model = Distiller(small(6, 3), teacher, example=images, method=KD)
        task = Training(
            model, Classification(6), optimizer=torch.optim.SGD, schedule=Schedule(warmup_epochs=warmup), epochs=1
        )
        output, losses = model(images)
        task.loss_log.record(0, {"task": output.mean(), **losses}, images)
        console = Console(file=io.StringIO(), width=200)
        report(task, (images, labels, labels), console)
        return console.file.getvalue()

    good, bad = printed(2), printed(0)
    assert "teacher on this batch: 75.0 % right (chance 16.7 %)" in good
    assert "output/kd" in good
    assert "warning" not in good
    assert "warning: the teacher is hardly better than chance" in bad
    assert "warning: the rate rises" in printed(2, warmup=3)


class TestLayout:
    @pytest.mark.parametrize(("asked", "expected"), [(None, True), (True, True), (False, False)])
    def test_on_a_cpu_all_that_is_trained_and_the_teacher_have_the_channels_last(
        self, image_files, model_file, asked, expected
    ):
        training = built(
            f"{model_file}:small",
            arrays(image_files),
            teacher=f"{model_file}:large",
            method=DiffKD,
            channels_last=asked,
            accelerator="cpu",
        )
        models = (training.student, training.distiller.methods, training.distiller.teacher)
        for model in models:
            maps = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
            assert maps
            assert all(p.is_contiguous(memory_format=torch.channels_last) == expected for p in maps)

    def test_it_changes_the_numbers_by_rounding_only(self, tmp_path, image_files, model_file):
        weights = []
        for asked in (True, False):
            folder = tmp_path / str(asked)
            options = {"method": METHODS["diffkd"], "max_steps": 4, "precision": "64-true"}
            train(arrays(image_files), folder, model_file, channels_last=asked, **options)
            weights.append(read_weights(folder / "student.safetensors"))
        for name, value in weights[0].items():
            torch.testing.assert_close(value, weights[1][name], **EXACT)


def test_what_a_run_held_is_free_when_the_next_begins(tmp_path, image_files, model_file):
    gc.disable()  # which otherwise comes at some time or other
    try:
        data = arrays(image_files)
        held = weakref.ref(data)
        train(data, tmp_path / "first", model_file, max_steps=1)
        del data
        train(arrays(image_files), tmp_path / "second", model_file, max_steps=1)
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", [True, "reduce-overhead"])
def test_the_step_can_be_compiled_in_different_ways(image_files, model_file, how):
    training = built(f"{model_file}:small", arrays(image_files), compile=how, accelerator="cpu")
    assert training.model._compiled_call_impl is not None


def test_an_unknown_way_to_compile_is_refused_at_once(image_files, model_file):
    with pytest.raises(RuntimeError, match="mode=fast"):
        built(f"{model_file}:small", arrays(image_files), compile="fast", accelerator="cpu")


def test_shards_are_not_compiled(tmp_path, image_files, model_file):
    with pytest.raises(ValueError, match="not with fsdp"):
        train(arrays(image_files), tmp_path / "run", model_file, strategy="fsdp", compile=True)


@pytest.mark.parametrize(("right", "warned"), [(8, False), (6, False), (4, True)])
def test_a_good_teacher_of_two_classes_is_not_called_chance(right, warned):
    labels = torch.arange(8) % 2
    answers = torch.where(torch.arange(8) < right, labels, 1 - labels)

    def teacher(images):
        return torch.nn.functional.one_hot(answers, 2).float()

    training = Training(
        torch.nn.Linear(3, 2),
        Classification(2),
        optimizer=torch.optim.SGD,
        schedule=Schedule(),
        epochs=1,
        teacher=teacher,
    )
    console = Console(file=io.StringIO(), width=200)
    report(training, (torch.randn(8, 3), labels, labels), console)
    assert ("hardly better than chance" in console.file.getvalue()) is warned
