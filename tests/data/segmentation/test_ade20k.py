import inspect
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from diffkd.data import Ade20k


@pytest.fixture
def root(tmp_path):
    for split in ("training", "validation"):
        for folder in ("images", "annotations"):
            (tmp_path / "data" / folder / split).mkdir(parents=True)
        Image.new("RGB", (3, 2)).save(tmp_path / "data" / "images" / split / "ADE_1.jpg")
        ids = np.array([[0, 1, 2], [150, 150, 0]], dtype=np.uint8)
        Image.fromarray(ids).save(tmp_path / "data" / "annotations" / split / "ADE_1.png")
    return tmp_path / "data"


def names(root, count):
    lines = ["Idx\tRatio\tTrain\tVal\tName"]
    lines += [f"{index}\t0.1\t{10 * index}\t3\tthing {index}, also known" for index in range(1, count + 1)]
    (root / "objectInfo150.txt").write_text("\n".join(lines))


def test_zero_is_ignored_and_the_rest_counts_from_zero(root):
    data = Ade20k(root, num_workers=0, crop_size=(4, 4), batch_size=1)
    assert (data.num_classes, data.ignore_index, data.classes[149]) == (150, 255, "class 149")
    ((images, masks, _),) = data.val_dataloader()
    assert images.shape == (1, 3, 2, 3)
    assert masks.tolist() == [[[255, 0, 1], [149, 149, 255]]]
    ((images, masks, _),) = data.train_dataloader()
    assert images.shape == (1, 3, 4, 4)
    assert all(hasattr(data, name) for name in inspect.signature(Ade20k).parameters)


def test_names_come_from_the_archives_list(root):
    names(root, 150)
    root.rename(root.parent / "ADEChallengeData2016")
    data = Ade20k(root.parent)
    assert (data.classes[0], data.classes[149]) == ("thing 1, also known", "thing 150, also known")


def test_an_incomplete_list_is_refused(root):
    names(root, 149)
    with pytest.raises(ValueError, match=r"objectInfo150.txt: no name for class 150"):
        Ade20k(root)


def test_an_id_beyond_the_classes_is_an_error(root):
    path = root / "annotations" / "validation" / "ADE_1.png"
    Image.fromarray(np.array([[0, 1, 2], [151, 150, 0]], dtype=np.uint8)).save(path)
    with pytest.raises(ValueError, match=rf"{path} holds id 151 at row 1, column 0"):
        list(Ade20k(root, num_workers=0).val_dataloader())


def test_broken_pairs_can_be_left_out(root):
    for name in ("ADE_2", "ADE_3"):
        Image.new("RGB", (3, 2)).save(root / "images" / "training" / f"{name}.jpg")
    (root / "annotations" / "training" / "ADE_2.png").write_bytes(b"broken")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = Ade20k(root, num_workers=0, crop_size=(4, 4), batch_size=1, on_bad_image="skip")
    assert data.train_dataloader().sampler.size == 1
    text = " ".join(str(one.message) for one in said)
    assert "ADE_2.png cannot be read" in text
    assert "ADE_3.jpg has no mask" in text
    assert len(data.skipped) == 1


def test_a_share_of_training_stands_in_for_the_evaluation_images(root):
    for name in ("ADE_2", "ADE_3", "ADE_4"):
        for folder, suffix in (("images", "jpg"), ("annotations", "png")):
            path = root / folder / "training"
            (path / f"{name}.{suffix}").write_bytes((path / f"ADE_1.{suffix}").read_bytes())
    shutil.rmtree(root / "images" / "validation")
    with pytest.raises(FileNotFoundError, match=r"validation: no such folder.*, or set val_share=0\.1"):
        Ade20k(root)
    data = Ade20k(root, num_workers=0, crop_size=(4, 4), batch_size=1, val_share=0.25)
    assert (data.train_dataloader().sampler.size, data.val_dataloader().sampler.size) == (3, 1)
