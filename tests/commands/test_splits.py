"""`diffkd test` measures the test images where there are any, and says which it measured."""

import json

import numpy as np
import pytest
import torch
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
    assert "measured on test, 6 images" in out
    assert "on the evaluation images, last epoch)" in out


def test_the_evaluation_images_can_be_asked_for(run, capsys):
    folder, _ = run
    evaluate(str(folder), split="val", **QUIET)
    out = capsys.readouterr().out
    assert "measured on val, 4 images" in out
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


def small(root, **options):
    return ImageFolder(root, image_size=8, num_workers=0, **options)


def measured(data, split="test"):
    name, loader = choose_split(data, split)
    assert name == split
    return torch.cat([batch[1] for batch in loader()]).tolist()


def test_links_among_the_test_images_are_followed_or_refused(tmp_path):
    root = pictures(tmp_path / "data", {"train": 2, "val": 1, "test": 3})
    (tmp_path / "cache").mkdir()
    for name in ("cat", "dog"):
        for path in list((root / "test" / name).iterdir())[name == "cat" :]:
            path.rename(tmp_path / "cache" / f"{name}-{path.name}")
            path.symlink_to(tmp_path / "cache" / f"{name}-{path.name}")
    assert measured(small(root, follow_links=True)) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"test/cat/.*: a link to .*set follow_links=true"):
        choose_split(small(root))


def test_test_images_of_other_classes_are_refused_as_evaluation_images_are(tmp_path):
    root = pictures(tmp_path / "data", {"train": 2, "val": 1, "test": 3})
    (root / "test" / "dog").rename(root / "test" / "Dog")
    with pytest.raises(ValueError, match=r"test: class\(es\) 'Dog' are not in .*train"):
        choose_split(small(root))
    assert measured(small(root), "val") == [0, 1]
    (root / "test" / "cat").rename(root / "test" / "unknown")
    with pytest.warns(UserWarning, match=r"test: passed over as a test set without labels, .* such as 'cat'"):
        assert choose_split(small(root))[0] == "val"
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(ValueError, match="no test split with labels"):
        choose_split(small(root), "test")


def test_broken_test_images_are_left_out_or_named_at_the_start(tmp_path):
    root = pictures(tmp_path / "data", {"train": 2, "val": 1, "test": 3})
    path = root / "test" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:45])
    data = small(root, on_bad_image="skip")
    with pytest.warns(UserWarning, match=r"test: 1 of 6 images are left out"):
        assert measured(data) == [0, 0, 1, 1, 1]
    assert len(data.skipped) == 1
    with pytest.raises(ValueError, match=rf"test: 1 of 6 images are broken.*{path}"):
        choose_split(small(root, verify=True))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"1\.png is empty or may not be read"):
        choose_split(small(root))


def test_images_held_back_from_training_are_not_called_test(tmp_path):
    root = pictures(tmp_path / "data", {"train": 4, "test": 3})
    data = small(root, val_share=0.25)
    assert measured(data, "val") == [0, 1]
    assert measured(data) == [0, 0, 0, 1, 1, 1]


def test_masks_of_a_test_split(tmp_path, capsys):
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            folder = tmp_path / "data" / split / kind
            folder.mkdir(parents=True)
            for index in range(2):
                shape = (16, 16, 3) if kind == "images" else (16, 16)
                pixels = np.full(shape, index, dtype=np.uint8)
                pixels[:8] = 1
                Image.fromarray(pixels).save(folder / f"{index}.png")
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
        assert f"measured on {name}, 2 images" in capsys.readouterr().out
    card = json.loads((tmp_path / "run" / "student.json").read_text())
    card["data"]["init_args"]["val_share"] = 0.5
    (tmp_path / "run" / "student.json").write_text(json.dumps(card))
    for split, name in ((None, "test, 2 images"), ("val", "val, 1 image")):
        evaluate(str(tmp_path / "run"), split=split, **QUIET)
        assert f"measured on {name}\n" in capsys.readouterr().out
    (tmp_path / "data" / "test" / "masks" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"test/images/1\.png"):
        evaluate(str(tmp_path / "run"), **QUIET)
    (tmp_path / "data" / "test" / "masks" / "0.png").unlink()
    evaluate(str(tmp_path / "run"), **QUIET)
    assert "measured on val" in capsys.readouterr().out
