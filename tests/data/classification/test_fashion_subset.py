import hashlib
import json
from importlib.resources import files

import torch

from diffkd.data import FashionSubset
from diffkd.data.classification.fashion_mnist import read_fashion_subset

ASSETS = files("diffkd").joinpath("assets", "fashion_mnist")


def test_the_classes_are_balanced():
    train, test = read_fashion_subset()
    assert torch.equal(torch.bincount(train.labels), torch.full((10,), 800))
    assert torch.equal(torch.bincount(test.labels), torch.full((10,), 200))
    assert train.images.shape == (8000, 1, 28, 28)
    assert test.images.shape == (2000, 1, 28, 28)


def test_the_pixels_are_those_the_card_states():
    card = json.loads(ASSETS.joinpath("card.json").read_text(encoding="utf-8"))
    for part, data in zip(("train", "test"), read_fashion_subset(), strict=True):
        for name, tensor in (("images", data.images), ("labels", data.labels.to(torch.uint8))):
            digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            assert digest == card["arrays"][f"{part}_{name}"]["sha256"]


def test_it_stays_small_and_carries_its_licence():
    assert len(ASSETS.joinpath("subset.npz").read_bytes()) <= 4_000_000
    assert "Copyright (c) 2017 Zalando SE" in ASSETS.joinpath("LICENSE").read_text(encoding="utf-8")


def test_the_module_serves_it_normalised():
    data = FashionSubset(batch_size=500)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, (28, 28))
    images = torch.cat([batch[0] for batch in data.val_dataloader()])
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05
    assert len(data.train_dataloader()) == 16
    assert data.example().shape == (2, 1, 28, 28)
