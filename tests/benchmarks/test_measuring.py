"""The measuring itself is measured: on things whose time, memory and arithmetic are known."""

import json
import time

import pytest
import torch
from benchmarks import epoch, gradients, growth, layouts, step
from benchmarks.cases import CASES
from benchmarks.contestants import Settings, make_step
from benchmarks.counting import bytes_moved, multiply_adds
from benchmarks.memory import peak_bytes
from benchmarks.roofline import Rates, measured_rates
from benchmarks.timing import ratios, take_turns
from tiny_recipe import TRUST, write_recipe
from torch import nn


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


def test_turns_alternate_and_ratios_compare_the_same_round():
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = take_turns(steps, 4, warm_up=0)
    assert "".join(order) == "abbaabba"
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}
    slow = ratios({"a": [2.0, 20.0, 6.0], "b": [1.0, 10.0, 2.0]}, "b")["a"]
    assert (slow.median, slow.high, slow.n) == (2.0, 2.5, 3)


def test_times_are_seconds():
    times = take_turns({"sleep": lambda: time.sleep(0.02)}, 2, warm_up=0)
    assert all(0.02 <= seconds < 1 for seconds in times["sleep"])


def test_peak_memory_counts_what_lives_at_once():
    def make():
        kept = torch.zeros(1000)  # 4,000 bytes throughout

        def run():
            for _ in range(3):
                kept.add_(torch.ones(500)[:10].sum())  # 2,000 bytes, one after the other, and a scalar of 4

        return run

    assert 6000 <= peak_bytes(make) <= 6100
    # What autograd saves lives on: the input, ten results of exp, and their gradients as they come.
    x = torch.zeros(1000, requires_grad=True)

    def saving():
        def run():
            y = x
            for _ in range(10):
                y = y.exp()
            y.sum().backward()

        return run

    assert 40_000 <= peak_bytes(saving) <= 60_000


def test_multiply_adds_of_a_linear_layer():
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    assert multiply_adds(lambda: layer(x)) == 3 * 7 * 5
    assert multiply_adds(lambda: layer(x).sum().backward()) == 2 * 3 * 7 * 5


def test_bytes_moved_are_those_of_inputs_and_outputs():
    x, y = torch.randn(10, 100), torch.randn(10, 100).bfloat16()
    assert bytes_moved(lambda: x + 1) == 2 * 4000
    assert bytes_moved(lambda: y * y) == 3 * 2000
    assert bytes_moved(lambda: x.t().reshape(100, 10)[:5].unsqueeze(0)) <= 2 * 4000  # a copy at most: views are free
    assert bytes_moved(lambda: x.view(1000)[:5].unsqueeze(0)) == 0
    layer = nn.Linear(100, 7, bias=False)
    assert bytes_moved(lambda: layer(x)) == 4 * (10 * 100 + 100 * 7 + 10 * 7)


def test_a_step_takes_what_takes_longer_at_the_rates():
    assert Rates(100, 10).seconds(500, 20) == 5
    assert Rates(100, 10).seconds(500, 80) == 8
    for dtype in (torch.float32, torch.bfloat16):
        rates = measured_rates("cpu", dtype, size=64, block=2**12)
        assert 0 < rates.seconds(1, 1) < 1
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("contestant", ["diffkd", "checkpointed"])
@pytest.mark.parametrize("settings", [Settings(), Settings(precision="bf16"), Settings(precision="bf16-true")])
def test_steps_train_the_methods_parameters(settings, contestant):
    case = CASES["segmentation"].smaller()
    made = make_step(case, contestant, settings)
    made.run()
    assert made.parameters > 1000
    fitnet = make_step(case, "fitnet", settings)
    assert fitnet.parameters == 19 * 19 + 19


def test_step_measures_and_reports(tmp_path, capsys):
    words = [
        "--case",
        "segmentation",
        "--small",
        "--rounds",
        "2",
        "--contestants",
        "fitnet",
        "diffkd",
        "checkpointed",
        "--device",
        "cpu",
        "--batch",
        "4",
    ]
    results = step.main([*words, "--out", str(tmp_path)])
    measured = results["segmentation"]
    assert measured["diffkd"]["over"]["fitnet"]["n"] == 2
    assert measured["diffkd"]["multiply_adds"] > measured["fitnet"]["multiply_adds"] > 0
    assert (
        measured["diffkd"]["peak_bytes"] > measured["checkpointed"]["peak_bytes"] > measured["fitnet"]["peak_bytes"] > 0
    )
    assert measured["checkpointed"]["multiply_adds"] > measured["diffkd"]["multiply_adds"]
    assert measured["diffkd"]["bound_milliseconds"] > measured["fitnet"]["bound_milliseconds"] > 0
    written = json.loads((tmp_path / "step-cpu-float32.json").read_text(encoding="utf-8"))
    assert written["cases"] == json.loads(json.dumps(results))
    assert written["machine"]["torch"] == torch.__version__
    assert (tmp_path / "step-cpu-float32.png").stat().st_size > 1000
    assert "over fitnet" in capsys.readouterr().out


def test_who_cannot_take_part_is_refused():
    with pytest.raises(ValueError, match="'kd' cannot take part here; choose from fitnet, diffkd, checkpointed, plain"):
        make_step(CASES["fpn"], "kd", Settings())


def test_growth_varies_one_thing(tmp_path, capsys):
    words = ["--vary", "pairs", "--small", "--rounds", "1", "--device", "cpu"]
    words += ["--contestants", "diffkd", "checkpointed"]
    points = growth.main([*words, "--out", str(tmp_path)])["pairs"]
    assert list(points) == [1, 2, 4]
    arithmetic = [point["diffkd"]["multiply_adds"] for point in points.values()]
    assert arithmetic == [arithmetic[0], 2 * arithmetic[0], 4 * arithmetic[0]]
    assert all(point["checkpointed"]["multiply_adds"] > point["diffkd"]["multiply_adds"] for point in points.values())
    assert (tmp_path / "growth-cpu-float32.png").stat().st_size > 1000
    assert "checkpointed, ms" in capsys.readouterr().out


def test_epoch_runs_a_recipe_from_end_to_end(recipe, tmp_path):
    facts = epoch.main(["--recipe", str(recipe), "--epochs", "2", "--out", str(tmp_path / "results"), "--", TRUST])
    assert len(facts["epochs"]) == 2
    assert facts["images_per_second"] == pytest.approx(40 / facts["seconds_per_epoch"])
    assert facts["seconds_per_epoch"] == pytest.approx(facts["epochs"][1])
    assert json.loads((tmp_path / "results" / "epoch-cpu.json").read_text(encoding="utf-8")) == facts


def test_epoch_says_when_the_training_failed(tmp_path, capsys):
    with pytest.raises(RuntimeError, match=r"diffkd fit .* ended with exit status"):
        epoch.main(["--recipe", str(tmp_path / "none.yaml"), "--out", str(tmp_path)])
    assert "none.yaml" in capsys.readouterr().err


def test_gradients_grow_with_the_weight_of_the_method(recipe, tmp_path, capsys):
    words = [
        "--recipe",
        str(recipe),
        "--methods",
        "kd",
        "diffkd",
        "--steps",
        "1",
        "5",
        "--seeds",
        "2",
        "--out",
        str(tmp_path),
    ]
    single = gradients.main([*words, "--", TRUST, "--method_weight", "1"])["ratios"]
    assert set(single) == {"kd", "diffkd"}
    assert all(len(seeds) == 2 and min(seeds) > 0 for steps in single.values() for seeds in steps.values())
    assert "diffkd" in capsys.readouterr().out
    tenfold = gradients.main([*words, "--", TRUST, "--method_weight", "10"])["ratios"]
    assert tenfold["kd"][1] == pytest.approx([10 * ratio for ratio in single["kd"][1]], rel=1e-4)


def test_a_student_that_nobody_teaches_has_no_gradients_to_compare(recipe):
    with pytest.raises(ValueError, match="no method teaches the student"):
        gradients.main(["--recipe", str(recipe), "--methods", "alone", "--", TRUST])


def test_layouts_are_held_against_what_is_known(tmp_path):
    result = layouts.main(["--networks", "test_vit", "test_resnet", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "layouts.json").read_text())["summary"] == result["summary"]
    assert result["summary"]["read"] == result["summary"]["as timm"] == 6
    assert result["summary"]["right"] > 10 * result["summary"]["wrong"]
    assert [row["shape"] for row in result["rows"]] == ["64x4x4", "64x8x8", "64x10x14", "96x2x2", "96x4x4", "96x5x7"]
