"""Recipes: short, complete, and understood by `fit`."""

from pathlib import Path

import pytest
import torch
import yaml

from diffkd import DiffKD
from diffkd.commands import cli
from diffkd.commands.arguments import values_of_fit
from diffkd.distill.matching import pair_layers
from diffkd.features.layers import list_layers
from diffkd.models import load_detector, load_model, load_segmenter
from diffkd.recipes import find_recipe, recipe_names

TRAININGS = [name for name in recipe_names() if not name.startswith("methods/")]
TABLE_9 = [
    *("wrn_40_2-wrn_40_1", "resnet56-resnet20", "resnet32x4-resnet8x4"),
    *("resnet50-mobilenetv2", "resnet32x4-shufflenetv1", "resnet32x4-shufflenetv2"),
]


TABLE_6 = {
    "deeplabv3_resnet18": "smp/DeepLabV3/resnet18",
    "deeplabv3_resnet18-scratch": "smp/DeepLabV3/resnet18",
    "pspnet_resnet18": "smp/PSPNet/resnet18",
    "deeplabv3_mobilenetv2": "smp/DeepLabV3/mobilenet_v2",
}
PRESETS = [name for name in recipe_names() if name.startswith("methods/")]


def values_of(name):
    return yaml.safe_load(find_recipe(name).read_text())


def test_the_papers_trainings_are_there():
    assert {f"cifar100/{pair}" for pair in TABLE_9} <= set(TRAININGS)
    on_imagenet = [name for name in TRAININGS if name.startswith("imagenet/")]
    assert len(on_imagenet) == 7
    for name in on_imagenet:
        values, width = values_of(name), 768 if "swin_large" in name else 1024
        assert "pairs" not in values
        assert values["method"]["init_args"] == {"ae_channels": width, "logits_autoencoder": False}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_recipe_is_12_to_20_lines_after_a_title(name):
    title, *lines = find_recipe(name).read_text().splitlines()
    assert title.startswith("# ")
    assert 12 <= len([line for line in lines if line.strip() and not line.startswith("#")]) <= 20
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", TRAININGS)
def test_a_recipe_is_understood(name, capsys):
    """All names and types fit; no data are read."""
    with pytest.raises(SystemExit) as done:
        cli.main(["fit", name, "--out=somewhere", "--print_config"])
    assert done.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for key, value in values_of(name).items():
        if key == "detection":
            assert resolved[key] == {"anchor_scale": None} | value
        elif key not in ("out", "method", "pairs", "data", "optimizer", "schedule"):
            assert resolved[key] == value, key
    assert resolved["schedule"]["kind"] in ("step", "cosine", "poly")


@pytest.mark.parametrize("name", [name for name in TRAININGS if "teacher" in values_of(name)])
def test_a_recipe_names_models_that_exist(name):
    values = values_of(name)
    for side in ("student", "teacher"):
        if values[side].startswith("cifar/"):
            load_model(values[side])
        elif values[side].startswith("smp/"):
            with torch.device("meta"):
                load_segmenter(values[side], num_classes=19)
        elif values[side].startswith(("fasterrcnn/", "retinanet/", "fcos/")):
            with torch.device("meta"):
                load_detector(values[side], num_classes=3, **values.get("detection", {}))
        else:
            assert values["teacher_pretrained"] is True


@pytest.mark.parametrize("name", ["imagenet/resnet34-resnet18", "imagenet/swin_large-swin_tiny"])
def test_a_comparison_on_imagenet_trains_what_it_says(name):
    """A preset takes the place of the recipe's method; another DiffKD keeps the recipe's autoencoder."""

    def values(preset):
        resolved = values_of_fit([name, f"--config={find_recipe(f'methods/{preset}')}", "--out=somewhere"])
        assert resolved["pairs"] == "auto"
        return resolved

    assert values("alone").get("method") is values("alone").get("teacher") is None
    assert values("imagenet/kd")["method"]["class_path"] == "diffkd.KD"
    plain, dagger = (values(preset)["method"]["init_args"] for preset in ("diffkd", "diffkd-dist"))
    assert plain["ae_channels"] == (768 if "swin_large" in name else 1024)
    assert plain["logits_autoencoder"] is False
    assert dagger == plain | {"logits_distance": "dist"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_which_pairs(preset):
    """Otherwise a comparison would train the recipe's pairs, with methods of their own, under the preset's name."""
    assert "pairs" in values_of(preset)


def test_a_preset_takes_the_place_of_pairs_with_methods_of_their_own(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("student: a\nteacher: b\nout: c\npairs: [{student: x, teacher: y, method: diffkd.AT}]\n")
    words = [str(recipe), "--data=diffkd.data.FashionSubset"]
    assert "AT" in str(values_of_fit(words)["pairs"])
    for preset in ("alone", "kd", "diffkd"):
        assert values_of_fit([*words, f"--config={find_recipe(f'methods/{preset}')}"])["pairs"] == "auto"


@pytest.mark.parametrize(
    ("student", "teacher", "layer"),
    [("torchvision/resnet18", "torchvision/resnet34", "layer4"), ("timm/mobilenetv1_100", "timm/resnet50", "bn2")],
)
def test_the_pairs_of_imagenet_are_found(student, teacher, layer):
    """The last map before pooling, and the logits (Sec. 4.1 of the paper)."""
    images = torch.zeros(2, 3, 64, 64)
    layers = [list_layers(load_model(one, num_classes=10).eval(), images) for one in (student, teacher)]
    assert [(pair.student, pair.teacher) for pair in pair_layers(*layers, DiffKD)] == [
        (layer, "layer4"),
        ("output", "output"),
    ]


@pytest.mark.parametrize("pair", TABLE_9)
def test_strategy_a1(pair):
    values = values_of(f"cifar100/{pair}")
    small = "mobilenet" in pair or "shufflenet" in pair
    assert values["optimizer"]["init_args"] == {
        "lr": 0.01 if small else 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    assert values["epochs"] == 240
    assert values["data"]["init_args"]["batch_size"] == 64
    assert values["schedule"]["milestones"] == [150, 180, 210]
    # What a teacher's run leaves is where the student's looks for it.
    assert values["teacher_weights"] == f"runs/{values['teacher'].replace('cifar/', 'cifar100/')}"


@pytest.mark.parametrize("name", TABLE_6)
def test_the_papers_trainings_of_segmenters(name):
    values = values_of(f"cityscapes/deeplabv3_resnet101-{name}")
    data = values["data"]["init_args"]
    assert values["student"] == TABLE_6[name]
    assert values["pretrained_backbone"] is (not name.endswith("scratch"))
    assert values["optimizer"]["init_args"] == {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
    assert values["schedule"] == {"kind": "poly", "power": 0.9}
    assert (data["crop_size"], data["augmentation"]) == ([512, 1024], {"scale": [0.5, 2.0], "flip": True})
    batches = -(-2975 // data["batch_size"])
    assert round(40_000 / batches) == values["epochs"]
    teacher = values_of("cityscapes/teacher")
    assert (values["teacher"], values["teacher_weights"]) == (teacher["student"], teacher["out"])
    assert {key: teacher[key] for key in ("data", "epochs", "optimizer", "schedule")} == {
        key: values[key] for key in ("data", "epochs", "optimizer", "schedule")
    }


@pytest.mark.parametrize(
    "folder", [name.removesuffix("/alone").removeprefix("methods/") for name in PRESETS if name.endswith("/alone")]
)
def test_presets_fit_their_recipe(folder, capsys):
    """Every method of a task is understood on top of a recipe of that task."""
    recipe = {"methods": "demo", "segmentation": "scenes/segmentation"}.get(folder)
    if recipe is None:
        pytest.skip(f"no small recipe for the presets in {folder}")
    for name in PRESETS:
        if name.rpartition("/")[0].removeprefix("methods/") != folder:
            continue
        with pytest.raises(SystemExit):
            cli.main(["fit", recipe, f"--config={find_recipe(name)}", "--out=somewhere", "--print_config"])
        resolved = yaml.safe_load(capsys.readouterr().out)
        taught = resolved["method"] is not None or resolved["pairs"] != "auto"
        assert taught == (not name.endswith("/alone")) == (resolved["teacher"] is not None), name


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("methods/segmentation/")])
def test_a_preset_says_in_its_first_line_where_its_values_are_from(name):
    title = find_recipe(name).read_text().splitlines()[0]
    assert title.startswith("# ")
    assert "(" in title or name.endswith("/alone") or "no source" in title


@pytest.mark.parametrize("name", [name for name in TRAININGS if name.startswith("coco/")])
def test_strategy_of_detection(name):
    """Table 1 of the paper and Sec. 4.2: 24 epochs, batches of 16, weight 5 on the pyramid and 1 on the boxes."""
    values = values_of(name)
    rate = 0.02 if values["student"].startswith("fasterrcnn/") else 0.01
    assert values["optimizer"]["init_args"] == {"lr": rate, "momentum": 0.9, "weight_decay": 1e-4}
    assert (values["epochs"], values["data"]["init_args"]["batch_size"]) == (24, 16)
    assert values["schedule"]["milestones"] == [16, 22]
    if "teacher" in values:
        assert values["method"] == [{"class_path": "diffkd.DiffKD", "init_args": {"kd_weight": 5.0}}, "diffkd.BoxKD"]
        assert values["teacher_weights"] == f"runs/coco/{values['teacher'].replace('/', '_')}"


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("methods/detection/")])
def test_methods_of_detection_are_understood(name, capsys):
    words = ["fit", "scenes/detection", f"--config={find_recipe(name)}", "--out=somewhere", "--print_config"]
    with pytest.raises(SystemExit) as done:
        cli.main(words)
    assert done.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert ("Shared" in str(resolved["method"])) == name.endswith("shared")
    assert (resolved["teacher"] is None) == (name == "methods/detection/alone") == (resolved["method"] is None)
    assert "(" in find_recipe(name).read_text().splitlines()[0] or name.endswith(("alone", "attention"))


def test_files_and_names_are_found(tmp_path):
    (tmp_path / "own.yaml").write_text("epochs: 1")
    assert find_recipe(str(tmp_path / "own.yaml")) == tmp_path / "own.yaml"
    assert find_recipe(TRAININGS[0]).is_file()
    with pytest.raises(FileNotFoundError, match="nearest: cifar100/resnet56-resnet20"):
        find_recipe("cifar100/resnet56-resnet21")
    with pytest.raises(FileNotFoundError):
        find_recipe("../recipes/cifar100/teacher")


def test_recipes_are_listed(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert "CIFAR-100, strategy A1: ResNet-56 teaches ResNet-20" in "\n".join(lines)
    assert Path(find_recipe("cifar100/teacher")).is_absolute()
