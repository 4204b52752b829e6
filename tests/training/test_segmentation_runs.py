"""Whole trainings of segmenters: odd sizes, resuming, several processes, and what `evaluate` finds again."""

import functools
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from short_trainings import Tripwire, same_weights, signal_self
from torch.nn import functional as F
from two_processes import run_in_two

from diffkd import CIRKD, KD, DiffKD, FitNet
from diffkd.commands.arguments import fit_with
from diffkd.commands.evaluate import data_of, evaluate
from diffkd.data import MaskFolder, SegmentationAugmentation, SegmentationScenes
from diffkd.files.weights import read_weights
from diffkd.models import load_segmenter
from diffkd.recipes import find_recipe, recipe_names
from diffkd.tasks.options import SegmentationOptions
from diffkd.training.checkpointing import Interrupted
from diffkd.training.fit import fit

MODELS = str(Path(__file__).parents[1] / "tiny_segmenters.py")
NAMES = ("sky", "road", "car")
PSPNET = "smp/pspnet/timm/test_resnet"
SCENES = {"train_count": 10, "val_count": 5, "size": (40, 48), "classes": ("Bag", "Dress"), "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of odd sizes, their classes told apart by brightness, a border ignored."""
    root = tmp_path_factory.mktemp("masked")
    draw = np.random.default_rng(0)
    for split, sizes in (("train", [(33, 47)] * 4 + [(21, 70)] * 5), ("val", [(33, 47), (33, 47), (50, 19)])):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index, size in enumerate(sizes):
            mask = np.zeros(size, np.uint8)
            mask[size[0] // 3 :] = 1
            mask[size[0] // 2 :, : size[1] // 2] = 2
            image = (draw.integers(0, 60, (*size, 3)) + 80 * mask[:, :, None]).astype(np.uint8)
            mask[:2] = 255
            Image.fromarray(image).save(root / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    return root


def masked(root, **options):
    options = {"batch_size": 4, "classes": NAMES, "crop_size": (33, 50), "num_workers": 0} | options
    return MaskFolder(root, **options)


def scenes(**options):
    return SegmentationScenes(**(SCENES | options))


def train(data, out, student=f"{MODELS}:small", **options):
    """Two epochs, alone or taught by an untrained `large`."""
    if options.get("method") is not None:
        options = {"teacher": f"{MODELS}:large"} | options
    defaults = {"epochs": 2, "progress": False, "accelerator": "cpu", "log_every": 2}
    return fit(student, data, out, **(defaults | options))


def numbers(row):
    names = ("miou", "pixel_accuracy", "loss")
    return {name: value for name, value in row.items() if name in names or name.startswith("iou/")}


@pytest.mark.parametrize(
    ("student", "options"),
    [
        (f"{MODELS}:small", {"method": DiffKD, "ema": 0.5}),
        (f"{MODELS}:small", {"segmentation": SegmentationOptions(window=(20, 33), window_stride=(7, 33))}),
        (PSPNET, {"method": KD}),
    ],
)
def test_odd_sizes_and_what_was_recorded_is_found_again(tmp_path, folder, student, options):
    """Neither crops nor images are multiples of a stride; validated, saved, loaded and measured anew."""
    data = functools.partial(masked, folder, augmentation=SegmentationAugmentation(scale=(0.5, 2), flip=True))
    result = train(data(), tmp_path, student, **options)
    recorded = numbers(result["last"])
    assert set(recorded) == {"miou", "pixel_accuracy", "loss", *(f"iou/{name}" for name in NAMES)}
    assert result["score"] == "miou"
    model = None if student == PSPNET else student
    assert evaluate(str(tmp_path), model=model, progress=False) == pytest.approx(recorded, abs=1e-6)


def test_the_card_alone_says_how_it_was_measured(tmp_path, folder):
    """Windows, size and precision are those of the training, and can be chosen anew."""
    options = SegmentationOptions(window=(16, 16))
    data = masked(folder, resize=(24, 40), full_size_masks=True)
    result = train(data, tmp_path, PSPNET, segmentation=options, precision="bf16-mixed", epochs=1)
    card = json.loads((tmp_path / "student.json").read_text())
    assert card["segmentation"]["window"] == [16, 16]
    assert card["precision"] == "bf16-mixed"
    found = evaluate(str(tmp_path), progress=False)
    assert found == pytest.approx(numbers(result["last"]), abs=1e-6)
    whole = evaluate(str(tmp_path), progress=False, segmentation=SegmentationOptions())
    assert whole["loss"] != found["loss"]


def test_mixed_precision_and_an_average(tmp_path):
    result = train(scenes(), tmp_path, method=DiffKD, precision="bf16-mixed", ema=0.9)
    assert {"miou", "miou_unaveraged"} <= result["last"].keys()
    assert all(np.isfinite(value) for value in result["last"].values())
    assert {tensor.dtype for tensor in read_weights(tmp_path / "student.safetensors").values()} == {
        torch.float32,
        torch.int64,
    }


class Tripping(SegmentationScenes):
    """Scenes that call something just before the given batch of the training is handed out."""

    def train_dataloader(self):
        return Tripwire(super().train_dataloader(), *self.trip)


@pytest.mark.parametrize(
    ("method", "trip"), [(DiffKD, 4), (functools.partial(CIRKD, classes=3, pixel_memory=64, region_memory=8), 2)]
)
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, method, trip):
    options = {"method": method, "ema": 0.8, "config": {"same": True}, "epochs": 2}
    train(scenes(), tmp_path / "whole", **options)
    data = Tripping(**SCENES)
    data.trip = trip, signal_self(signal.SIGTERM)
    with pytest.raises(Interrupted, match="--resume"):
        train(data, tmp_path / "stopped", **options)
    train(scenes(), tmp_path / "stopped", resume=True, **options)
    for name in ("student.safetensors", "best.safetensors"):
        assert same_weights(tmp_path / "whole" / name, tmp_path / "stopped" / name), name
    one, other = (json.loads((tmp_path / run / "result.json").read_text())["last"] for run in ("whole", "stopped"))
    assert one | {"seconds": 0} == other | {"seconds": 0}


def test_an_auxiliary_head_trains_and_comes_back_from_the_card(tmp_path):
    name = "torchvision/deeplabv3_mobilenet_v3_large"
    auxiliary = SegmentationOptions(auxiliary=True, auxiliary_weight=0.3)
    result = train(scenes(), tmp_path / "teacher", name, segmentation=auxiliary, max_steps=1, epochs=1)
    assert result["last"]["train/task/auxiliary"] > 0
    assert any(entry.startswith("aux_classifier") for entry in read_weights(tmp_path / "teacher/student.safetensors"))
    options = {"teacher": name, "teacher_weights": str(tmp_path / "teacher"), "method": KD, "max_steps": 1, "epochs": 1}
    taught = train(scenes(), tmp_path / "student", **options)
    assert {"train/task", "train/scorer/kd"} <= taught["last"].keys()
    assert "train/task/auxiliary" not in taught["last"]


def test_a_teacher_of_other_classes_is_known_by_its_card(tmp_path):
    train(scenes(classes=None), tmp_path / "teacher", PSPNET, max_steps=1, epochs=1)
    options = {"teacher": PSPNET, "teacher_weights": str(tmp_path / "teacher"), "method": FitNet}
    taught = train(scenes(), tmp_path / "student", PSPNET, epochs=1, **options)
    assert [name for name in taught["last"] if name.endswith("/kd")] == ["train/decoder/kd"]


def test_a_last_batch_of_one_image_is_left_out(tmp_path):
    """BatchNorm after global pooling cannot take it: 9 scenes in batches of 4 are two of them."""
    result = train(scenes(train_count=9), tmp_path, f"{MODELS}:pooled", epochs=1)
    assert result["last"]["step"] == 2


def test_batches_of_one_image_fail_at_the_first_step_where_the_model_cannot_take_them(tmp_path):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        train(scenes(batch_size=1), tmp_path / "pooled", f"{MODELS}:pooled")
    assert train(scenes(batch_size=1), tmp_path / "plain", epochs=1)["last"]["step"] == 10


def test_an_auxiliary_head_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="auxiliary"):
        train(scenes(), tmp_path / "run", PSPNET, segmentation=SegmentationOptions(auxiliary=True))
    assert not (tmp_path / "run").exists()


PRESETS = [name for name in recipe_names() if name.startswith("methods/segmentation/")]


# The second head of torchvision's models, which no small one has, is held by test_published_dense_recipes.
@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith("/dist-auxiliary")])
def test_every_preset_trains(tmp_path, preset):
    words = ["--data.train_count=8", "--data.val_count=2", "--data.batch_size=4", "--epochs=1", "--progress=false"]
    config = f"--config={find_recipe(preset)}"
    result = fit_with(["scenes/segmentation", config, *words, "--accelerator=cpu", f"--out={tmp_path}"])
    assert result["last"]["step"] == 2
    terms = [name for name in result["last"] if name.startswith("train/") and name != "train/task"]
    assert (terms == []) == preset.endswith("/alone")
    assert all(np.isfinite(value) for value in result["last"].values())


def train_half(out):
    train(scenes(), out, method=DiffKD, devices=2, ema=0.8)


def test_two_processes_measure_what_one_does(tmp_path):
    """Five images over two processes; exact counts, whoever has which."""
    codes, said = run_in_two(tmp_path / "log", train_half, tmp_path / "run")
    assert codes == [0, 0], said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["device"] == "2 x cpu"
    found = evaluate(str(tmp_path / "run"), model=f"{MODELS}:small", progress=False)
    assert found == pytest.approx(numbers(result["last"]), abs=1e-6)
    weights = tmp_path / "run" / "student.safetensors"
    model = load_segmenter(f"{MODELS}:small", num_classes=3, weights=weights).eval()
    hits = pixels = 0
    for images, masks, _ in scenes().val_dataloader():
        scores = model(F.pad(images, (0, 16, 0, 24)))  # to multiples of 32, which a model of unknown origin gets
        said = F.interpolate(scores, (64, 64), mode="bilinear").argmax(1)[:, :40, :48]
        hits, pixels = hits + int((said == masks).sum()), pixels + masks.numel()
    assert result["last"]["pixel_accuracy"] == pytest.approx(hits / pixels)


def test_scenes_are_drawn_again_from_the_seed_of_the_run(tmp_path):
    """On the command line the data get their seed from the run, and do not name it in the card."""
    data = SegmentationScenes(train_count=2, val_count=2, size=(32, 32), seed=5)
    card = {"seed": 5, "data": {"class_path": "diffkd.data.SegmentationScenes"}}
    card["data"]["init_args"] = {"train_count": 2, "val_count": 2, "size": [32, 32]}
    masks = [next(iter(one.val_dataloader()))[1] for one in (data, data_of(card))]
    assert torch.equal(*masks)
    card["seed"] = 6
    assert not torch.equal(masks[0], next(iter(data_of(card).val_dataloader()))[1])
