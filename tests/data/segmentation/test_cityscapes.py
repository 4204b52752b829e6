import numpy as np
import pytest
from PIL import Image

from diffkd.data import Cityscapes

# Stored ids, and the train ids of the official table; 7 is road and 33 bicycle, 1 to 3 and 29 do not count.
STORED = [0, 1, 7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 31, 32, 33]
TRAIN = [255, 255, *range(16), 255, 16, 17, 18]


def write(root, kind, ids):
    for split, city in (("train", "ulm"), ("train", "bonn"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        for folder, suffix in (
            ("leftImg8bit", "leftImg8bit"),
            ("gtFine", f"gtFine_{kind}"),
            ("gtFine", "gtFine_color"),
        ):
            path = root / folder / split / city / f"{stem}_{suffix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.array([ids], dtype=np.uint8)
            Image.fromarray(pixels if folder == "gtFine" else np.repeat(pixels[..., None], 3, axis=2)).save(path)
        (root / "gtFine" / split / city / f"{stem}_gtFine_polygons.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "ids", "labels"),
    [
        ("labelIds", STORED, "auto"),
        ("labelIds", STORED, "labelIds"),
        ("labelTrainIds", TRAIN, "auto"),
        ("labelTrainIds", TRAIN, "labelTrainIds"),
    ],
)
def test_both_kinds_of_labels_become_train_ids(tmp_path, kind, ids, labels):
    write(tmp_path, kind, ids)
    (tmp_path / "gtFine/train/ulm/._a_gtFine_labelIds.png").write_bytes(b"of macOS")
    data = Cityscapes(tmp_path, num_workers=0, labels=labels)
    assert (data.labels, data.num_classes, data.image_size) == (kind, 19, (512, 1024))
    assert data.classes[::6] == ("road", "traffic light", "rider", "bicycle")
    ((images, masks, indices),) = data.val_dataloader()
    assert images.shape == (1, 3, 1, 22)
    assert masks.tolist() == [[TRAIN]]
    assert indices.tolist() == [0]
    images, masks, _ = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 512, 1024)
    assert data.example().shape == (2, 3, 512, 1024)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit/train: no such folder"):
        Cityscapes(tmp_path)
    write(tmp_path, "labelIds", STORED)
    with pytest.raises(ValueError, match=r"gtFine/train: no mask whose name ends in '_gtFine_labelTrainIds'"):
        Cityscapes(tmp_path, labels="labelTrainIds")
    with pytest.raises(ValueError, match="labels='ids'"):
        Cityscapes(tmp_path, labels="ids")
    (tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(ValueError, match=r"gtFine/val: no mask"):
        Cityscapes(tmp_path)


def test_broken_pairs_can_be_left_out(tmp_path):
    write(tmp_path, "labelIds", STORED)
    (tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="1 of 2 training pairs are left out"):
        data = Cityscapes(tmp_path, num_workers=0, batch_size=1, on_bad_image="skip")
    assert data.train_dataloader().sampler.size == 1
