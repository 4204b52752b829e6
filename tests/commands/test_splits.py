"""`diffkd test` measures the test images where there are any, and says which it measured."""

import numpy as np
import pytest
from PIL import Image

from diffkd.commands.evaluate import evaluate
from diffkd.data import ImageFolder, MaskFolder
from diffkd.data.splits import choose_split
from diffkd.training.fit import fit

QUIET = {"accelerator": "cpu"}


def pictures(root, splits):
    for split, count in splits.items():
        for level, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(np.full((8, 8, 3), 200 * level + index, dtype=np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    root = pictures(folder / "data", {"train": 4, "val": 2, "test": 3})
    arguments = {"root": str(root), "batch_size": 4, "image_size": 8, "num_workers": 0}
    config = {"data": {"class_path": "diffkd.data.ImageFolder", "init_args": arguments}}
    fit(
        "cifar/compact_resnet8",
        ImageFolder(**arguments),
        folder / "run",
        epochs=1,
        progress=False,
        config=config,
        **QUIET,
    )
    return folder / "run", arguments


def test_the_test_images_are_measured_and_named(run, capsys):
    folder, _ = run
    evaluate(str(folder), **QUIET)
    out = capsys.readouterr().out
    assert "measured on test" in out
    assert "on the evaluation images, last epoch)" in out


def test_the_evaluation_images_can_be_asked_for(run, capsys):
    folder, _ = run
    evaluate(str(folder), split="val", **QUIET)
    out = capsys.readouterr().out
    assert "measured on val" in out
    assert "on the evaluation images" not in out


def test_what_is_measured_is_that_split(run):
    _, arguments = run
    data = ImageFolder(**arguments)
    counts = {}
    for split in ("test", "val", None):
        name, loader = choose_split(data, split)
        counts[name, split] = sum(len(batch[1]) for batch in loader())
    assert counts == {("test", "test"): 6, ("val", "val"): 4, ("test", None): 6}


def test_without_test_images_the_split_is_still_named(tmp_path):
    for splits, name in (
        ({"train": 2, "val": 1}, "val"),
        ({"train": 2, "test": 1}, "test"),
        ({"train": 2, "valid": 1}, "valid"),
    ):
        data = ImageFolder(pictures(tmp_path / name, splits), image_size=8, num_workers=0)
        assert choose_split(data)[0] == name
    with pytest.raises(ValueError, match=r"has no test split.*--split val"):
        choose_split(ImageFolder(tmp_path / "val", image_size=8, num_workers=0), "test")


def test_masks_of_a_test_split(tmp_path, capsys):
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            folder = tmp_path / "data" / split / kind
            folder.mkdir(parents=True)
            for index in range(2):
                shape = (16, 16, 3) if kind == "images" else (16, 16)
                Image.fromarray(np.full(shape, index, dtype=np.uint8)).save(folder / f"{index}.png")
    arguments = {
        "root": str(tmp_path / "data"),
        "num_classes": 2,
        "batch_size": 2,
        "num_workers": 0,
        "crop_size": [16, 16],
    }
    config = {"data": {"class_path": "diffkd.data.MaskFolder", "init_args": arguments}}
    data = MaskFolder(**{**arguments, "crop_size": (16, 16)})
    model = "torchvision/lraspp_mobilenet_v3_large"
    fit(model, data, tmp_path / "run", epochs=1, progress=False, config=config, **QUIET)
    for split, name in ((None, "test"), ("val", "val")):
        evaluate(str(tmp_path / "run"), split=split, **QUIET)
        assert f"measured on {name}" in capsys.readouterr().out
