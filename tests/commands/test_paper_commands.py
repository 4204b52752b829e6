"""The commands of docs/paper.md are understood, and set what they are there for."""

import re
import shlex
from pathlib import Path

import pytest

from diffkd.commands.arguments import values_of_fit
from diffkd.commands.compare import find_method
from diffkd.recipes import find_recipe

LINES = (Path(__file__).parents[2] / "docs" / "paper.md").read_text(encoding="utf-8").splitlines()
COMMANDS = [shlex.split(line.partition("diffkd ")[2]) for line in LINES if re.match(r"    (?:\S.* )?diffkd ", line)]
FITS = [command[1:] for command in COMMANDS if command[0] == "fit"]
COMPARISONS = [command[1:] for command in COMMANDS if command[0] == "compare"]


@pytest.mark.parametrize("words", FITS, ids=lambda words: words[2])
def test_an_ablation_differs_from_the_recipe_in_one_value(words):
    recipe, ablation = values_of_fit([words[0]]), values_of_fit(words)
    (method,) = ablation["method"] if isinstance(ablation["method"], list) else [ablation["method"]]
    full = recipe["method"]["init_args"]
    changed = {name for name in full | method["init_args"] if full.get(name) != method["init_args"].get(name)}
    changed |= {name for name in recipe if name not in ("method", "out") and recipe[name] != ablation.get(name)}
    assert len(changed) == 1, changed
    assert changed <= {"pairs", "ae_channels", "noise_adapter", "inference_steps"}


@pytest.mark.parametrize("words", COMPARISONS, ids=lambda words: words[-1])
def test_recipe_and_methods_of_a_comparison_exist(words):
    assert find_recipe(words[0]).is_file()
    first = words.index("--methods") + 1
    methods = words[first : next(i for i, word in enumerate(words) if i > first and word.startswith("--"))]
    assert all(find_method(method, words[0]).is_file() for method in methods)
    assert len({Path(method).stem for method in methods}) == len(methods)
    assert {Path(method).stem for method in methods} >= {"alone", "diffkd"}


def test_there_are_commands():
    assert len(FITS) == 6
    assert len(COMPARISONS) == 6
