"""A method of one's own in a pair, without type hints, and what is said of one that does not fit."""

import pytest
import yaml

from diffkd.commands import cli
from diffkd.commands.arguments import values_of_fit

MODULE = """
from torch import nn

class Mine(nn.Module):
    def __init__(self, student, teacher, scale=1):
        super().__init__()

class Typed(nn.Module):
    def __init__(self, student, teacher, scale: int = 1):
        super().__init__()
"""
FIT = ["fit", "--student=cifar/compact_resnet8", "--data=FashionSubset", "--out=unused"]


@pytest.fixture(autouse=True)
def _mine(tmp_path, monkeypatch):
    (tmp_path / "pair_methods.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("scale", ["2", "0.5", "[1, 2]", "{a: b}", "many"])
def test_an_argument_without_a_type_takes_any_plain_value(scale):
    pairs = f"[{{student: layer3, method: {{class_path: pair_methods.Mine, init_args: {{scale: {scale}}}}}}}]"
    (pair,) = values_of_fit([*FIT[1:], f"--pairs={pairs}"])["pairs"]
    assert pair["method"]["init_args"]["scale"] == yaml.safe_load(scale)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "{class_path: pair_methods.Mine, init_args: {scal: 2}}",
            "--pairs[1].method.scal of pair_methods.Mine: Mine has no option 'scal'; nearest: scale",
        ),
        (
            "{class_path: pair_methods.Typed, init_args: {scale: x}}",
            "--pairs[1].method.scale of pair_methods.Typed: 'x' is not a whole number; give what pair_methods.Typed",
        ),
        ("pair_methods.Type", "--pairs[1].method: there is no pair_methods.Type; nearest: pair_methods.Typed"),
        ("{class_path: nowhere.Mine}", "--pairs[1].method: No module named 'nowhere'; write package.module.Name"),
    ],
)
def test_what_is_wrong_inside_of_a_pair_is_named(capsys, method, message):
    assert cli.main([*FIT, f"--pairs=[{{student: layer2}}, {{student: layer3, method: {method}}}]"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_pair_may_stand_in_a_file(tmp_path, capsys):
    (tmp_path / "pairs.yaml").write_text("pairs: [{student: a}, {student: b, weight: x}]")
    assert cli.main([*FIT, f"--config={tmp_path / 'pairs.yaml'}"]) == 2
    assert "--pairs[1].weight: 'x' is not a number; give what a Pair takes there" in capsys.readouterr().err
