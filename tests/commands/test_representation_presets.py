"""The presets for data without labels, and the recipe that they are compared on."""

import pytest
import yaml

from diffkd.commands.arguments import fit_with
from diffkd.commands.compare import find_method
from diffkd.recipes import find_recipe, recipe_names
from diffkd.training.build import build_training
from diffkd.training.options import FitOptions

RECIPE = "representation/demo"
OWN = [name.rpartition("/")[2] for name in recipe_names() if name.startswith("methods/representation/")]
PAIRS = {"cwd": ["layer3"], "rkd": ["embedding"], "sp": ["embedding"], "pkt": ["embedding"]}


@pytest.mark.parametrize("name", [*OWN, "cosine", "fitnet", "diffkd", "rkd", "sp", "pkt"])
def test_a_preset_pairs_maps_and_embeddings(tmp_path, name):
    def check(data, config, **values):
        distiller = build_training(FitOptions(**values), data).distiller
        assert list(distiller.names) == PAIRS.get(name, ["layer3", "embedding"])
        assert all(shape.role == "feature" for sides in distiller.readers for side in sides for shape in side.shapes)
        standardised = [getattr(method, "standardization", None) is not None for method in distiller.methods]
        assert standardised == [("-direct" in name)] * len(standardised)

    fit_with(
        [RECIPE, f"--config={find_method(name, RECIPE)}", f"--out={tmp_path}/run", "--data.per_class=4"], use=check
    )


def test_the_control_differs_in_the_method_alone():
    ours, theirs = (
        yaml.safe_load(find_recipe(f"methods/representation/{kind}-direct").read_text())
        for kind in ("fitnet", "diffkd")
    )
    assert (ours["method"]["class_path"], theirs["method"]["class_path"]) == ("diffkd.FitNet", "diffkd.DiffKD")
    assert ours["method"]["init_args"]["standardize"] is theirs["method"]["init_args"]["standardize"] is True
    assert ours["pairs"] == theirs["pairs"] == "auto"


def test_images_without_labels_are_recognised(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {class_path: diffkd.data.UnlabelledFolder, init_args: {root: x}}\n")
    for wanted in (str(recipe), RECIPE):
        assert find_method("diffkd-direct", wanted) == find_recipe("methods/representation/diffkd-direct")
    recipe.write_text("data: {class_path: diffkd.data.Arrays, init_args: {train: x, test: y, labels: true}}\n")
    assert find_method("diffkd-direct", str(recipe)) == find_recipe("methods/diffkd-direct")
