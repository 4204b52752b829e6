"""The presets of a feature method beside a logit loss, on one recipe of each task."""

import pytest
import yaml
from tiny_recipe import TRUST, write_recipe

from diffkd.commands.arguments import fit_with
from diffkd.recipes import find_recipe, recipe_names
from diffkd.training.build import build_training
from diffkd.training.options import FitOptions

DIRECT = [name for name in recipe_names() if name.startswith("methods/") and "-direct" in name]


def values_of(name):
    return yaml.safe_load(find_recipe(name).read_text())


@pytest.mark.parametrize("name", [name for name in DIRECT if name.count("/") == 1])
def test_features_and_logits_have_a_method_each(tmp_path, name):
    recipe = write_recipe(tmp_path)
    words = [str(recipe), f"--config={find_recipe(name)}", f"--out={tmp_path}/run", TRUST]
    feature, logits = values_of(name)["method"]

    def check(data, config, **values):
        distiller = build_training(FitOptions(**values), data).distiller
        names = [pair.student for pair in distiller.pairs]
        kinds = list(zip(names, [type(method).__name__ for method in distiller.methods], strict=True))
        classes = [one["class_path"].removeprefix("diffkd.") for one in (feature, logits)]
        assert kinds == [("0", classes[0]), ("output", classes[1])]
        standardised = getattr(distiller.methods[0], "standardization", None) is not None
        assert standardised == (classes[0] == "DiffKD" or "standardized" in name.removesuffix("-standardized_kd"))

    fit_with(words, use=check)


@pytest.mark.parametrize("name", [name for name in DIRECT if "/fitnet" in name and "/representation/" not in name])
def test_a_control_has_the_logit_loss_of_what_it_controls(name):
    twin = name.replace("fitnet", "diffkd").removesuffix("-standardized")
    ours, theirs = values_of(name), values_of(twin)
    assert ours["method"][1] == theirs["method"][1]
    assert {k: v for k, v in ours.items() if k != "method"} == {k: v for k, v in theirs.items() if k != "method"}
