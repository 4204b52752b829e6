"""Options that all data of image files share: a share held back for evaluation, links, and 16-bit images."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffkd.data import ImageFolder, MaskFolder, YoloDetection
from diffkd.data.image_data import allow_missing_training_images
from diffkd.files.config import describe
from diffkd.files.run_folder import changed_values

NOISE = np.random.default_rng(0)


def folder(root):
    for split in ("train", "val"):
        for name, count in (("cat", 6), ("dog", 3)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(NOISE.integers(0, 256, (8, 8), np.uint8)).save(root / split / name / f"{index}.png")
    return ImageFolder, {"image_size": 8, "min_crop_area": 1.0}


def masks(root):
    for split in ("train", "val"):
        for kind, high in (("images", 256), ("masks", 3)):
            (root / split / kind).mkdir(parents=True)
            for index in range(9):
                Image.fromarray(NOISE.integers(0, high, (8, 8), np.uint8)).save(root / split / kind / f"{index}.png")
    return MaskFolder, {"num_classes": 3, "crop_size": (8, 8)}


def yolo(root):
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for index in range(9):
            path = root / "images" / split / f"{index}.png"
            Image.fromarray(NOISE.integers(0, 256, (8, 8), np.uint8)).save(path)
            (root / "labels" / split / f"{index}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    return YoloDetection, {"classes": ("cat",)}


def images_of(root):
    return sorted(path for path in root.rglob("*.png") if "train" in path.parts and "masks" not in path.parts)


@pytest.fixture(params=[folder, masks, yolo])
def made(request, tmp_path):
    module, options = request.param(tmp_path)
    return tmp_path, lambda **more: module(tmp_path, num_workers=0, batch_size=3, **(options | more))


def names(loader):
    dataset = loader._loader.dataset
    found = getattr(dataset, "samples", None) or getattr(dataset, "pairs", None)
    return list(found[0]) if found is not None else list(dataset.read.__self__.paths)


def test_a_share_of_train_is_held_back(made):
    root, module = made
    shutil.rmtree(root / "images" / "val" if (root / "images").is_dir() else root / "val")
    with pytest.raises(FileNotFoundError):
        module()
    data = module(val_share=0.34, seed=5)
    train, val = names(data.train_dataloader()), names(data.val_dataloader())
    assert (len(train), len(val)) == (6, 3)
    assert not set(train) & set(val)
    again = module(val_share=0.34, seed=5)
    assert (names(again.train_dataloader()), names(again.val_dataloader())) == (train, val)
    assert names(module(val_share=0.34, seed=6).val_dataloader()) != val
    assert describe(data)["init_args"]["val_share"] == 0.34
    for share in (0, 1, -0.5):
        with pytest.raises(ValueError, match=f"val_share={share} is no share"):
            module(val_share=share)


def test_classes_are_held_back_in_proportion(tmp_path):
    module, options = folder(tmp_path)
    data = module(tmp_path, val_share=0.34, num_workers=0, **options)
    assert [Path(name).parent.name for name in names(data.val_dataloader())] == ["cat", "cat", "dog"]


def test_a_missing_folder_names_the_share(tmp_path):
    folder(tmp_path)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(FileNotFoundError, match=r"val_share=0.1"):
        ImageFolder(tmp_path)


def test_links_lead_out_where_they_may(made, tmp_path_factory):
    root, module = made
    elsewhere = tmp_path_factory.mktemp("cache") / "0a1b"
    first = images_of(root)[0]
    first.rename(elsewhere)
    first.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"outside of .*follow_links=true"):
        module()
    assert len(names(module(follow_links=True).train_dataloader())) == 9
    with pytest.raises(ValueError, match="outside of"):
        module()  # the option of one module is none of the next


def test_folders_may_be_links_and_loops_are_noticed(tmp_path, tmp_path_factory):
    module, options = folder(tmp_path)
    shared = tmp_path_factory.mktemp("shared")
    (tmp_path / "train").rename(shared / "train")
    (shared / "train" / "cat" / "0.png").rename(shared / "0.png")
    (shared / "sub").mkdir()
    (shared / "0.png").rename(shared / "sub" / "0.png")
    (shared / "train" / "cat" / "more").symlink_to(shared / "sub")
    (tmp_path / "train").symlink_to(shared / "train")
    assert len(names(module(tmp_path, follow_links=True, num_workers=0, **options).train_dataloader())) == 9
    (shared / "sub" / "again").symlink_to(shared / "sub")
    with pytest.raises(ValueError, match="could loop"):
        module(tmp_path, follow_links=True, **options)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_twelve_bits_in_sixteen(made, kind):
    root, module = made
    for path in images_of(root):
        path.unlink()
        values = NOISE.integers(0, 4096, (8, 8)).astype(np.uint16)
        values[0, 0] = 4095
        Image.fromarray(values).save(path.with_suffix(f".{kind}"))
    with pytest.warns(UserWarning, match=r"reach 4095 of 65535 only.*12 bits set white_level=4095"):
        dark = module()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bright, same = module(white_level=4095), module(white_level=65535)
    example = [np.stack([np.asarray(one)[0] for one in data.example()]) for data in (dark, bright, same)]
    assert np.array_equal(example[0], example[2])
    spread = [float(one.max() - one.min()) for one in example]
    assert spread[1] == pytest.approx(spread[0] * 16, rel=0.1)
    with pytest.raises(ValueError, match="white_level=0 is no value of 16 bits"):
        module(white_level=0)


def test_full_sixteen_bits_and_eight_are_no_matter(made):
    root, module = made
    for path in images_of(root)[:4]:
        Image.fromarray(NOISE.integers(0, 65536, (8, 8)).astype(np.uint16)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module()


def test_evaluation_images_alone_can_be_measured(made):
    root, module = made
    for path in images_of(root):
        path.unlink()
    for folder in sorted((path for path in root.rglob("*") if "train" in path.parts), reverse=True):
        folder.rmdir() if folder.is_dir() else folder.unlink()
    with pytest.raises(FileNotFoundError, match="train"):
        module()
    with allow_missing_training_images():
        data = module()
    assert data.val_dataloader().sampler.size == 9
    assert len(data.example()) == 2
    with pytest.raises(FileNotFoundError, match="train"):
        module()
    shutil.rmtree(root / "images" if (root / "images").is_dir() else root / "val")
    with allow_missing_training_images(), pytest.raises(FileNotFoundError, match="train"):
        module()


def test_runs_from_before_these_options_go_on(made):
    _, module = made
    given = {"data": describe(module())}
    arguments = given["data"]["init_args"]
    new = ("follow_links", "val_share", "white_level", "keypoints")
    stored = {"data": given["data"] | {"init_args": {name: arguments[name] for name in arguments if name not in new}}}
    assert changed_values(stored, given) == []
    arguments["follow_links"] = True
    assert changed_values(stored, given) == ["data.follow_links is None there, True here"]
