import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from diffkd.commands.evaluate import data_of
from diffkd.data import Cifar
from diffkd.files.config import describe


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Write a tiny CIFAR-100 in the official form, and make its sums the expected ones."""
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    names = [f"class {index}" for index in range(100)]
    contents = {"meta": {"fine_label_names": names}}
    for part, count in (("train", 8), ("test", 4)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        contents[part] = {"data": pixels, "fine_labels": list(range(90, 90 + count))}
    sums = {}
    for name, content in contents.items():
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    return tmp_path


def test_the_official_form_is_read(root):
    data = Cifar(root, classes=100, batch_size=4, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert (data.num_classes, data.classes[90], data.in_channels, data.image_size) == (100, "class 90", 3, (32, 32))
    ((images, labels, _),) = data.val_dataloader()
    stored = pickle.loads((root / CIFAR100.base_folder / "test").read_bytes())["data"]
    assert torch.equal((images * 255).round().to(torch.uint8).flatten(1), torch.from_numpy(stored))
    assert labels.tolist() == [90, 91, 92, 93]
    assert len(data.train_dataloader()) == 2
    assert data.example().shape == (2, 3, 32, 32)


def test_data_of_a_run_from_python_can_be_made_again(root):
    data = Cifar(root, classes=100, batch_size=3)
    described = describe(data)
    assert described["init_args"]["classes"] == 100
    again = data_of({"data": described})
    assert (again.classes, again.batch_size) == (data.classes, 3)


def test_statistics_are_those_of_the_training_set(root):
    assert Cifar(root).mean == (0.50708, 0.48655, 0.44092)


def test_a_changed_archive_is_not_opened(root):
    path = root / CIFAR100.base_folder / "train"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(FileNotFoundError, match="not the official one"):
        Cifar(root)


@pytest.mark.parametrize("classes", [10, 100])
def test_missing_data_say_how_to_get_them(tmp_path, classes):
    with pytest.raises(FileNotFoundError, match=rf"CIFAR-{classes} is not in .*download=True"):
        Cifar(tmp_path, classes=classes)
