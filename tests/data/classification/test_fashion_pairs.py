"""Pairs of garments: a hundred classes composed of the packaged images."""

import pytest
import torch

from diffkd.data import FashionPairs, hold_out
from diffkd.data.classification.fashion_mnist import CLASSES, compose_pairs, read_fashion_part
from diffkd.data.classification.in_memory import ImageSet


def test_each_half_is_an_image_of_its_class_and_all_pairs_are_equally_frequent():
    single = ImageSet(torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 1, 2, 2), torch.arange(30) % 10)
    pairs = compose_pairs(single, 700, seed=3)
    assert pairs.images.shape == (700, 1, 2, 4)
    left, right = pairs.images[..., 0, 0].long().flatten(), pairs.images[..., 0, 3].long().flatten()
    assert torch.equal(left % 10, pairs.labels // 10)
    assert torch.equal(right % 10, pairs.labels % 10)
    assert torch.equal(pairs.labels.bincount(), torch.full((100,), 7))
    assert len(left.unique()) == 30  # all images are drawn
    again, other = compose_pairs(single, 700, seed=3), compose_pairs(single, 700, seed=4)
    assert torch.equal(again.images, pairs.images)
    assert not torch.equal(other.labels, pairs.labels)


def test_pairs_are_the_same_for_every_seed_and_evaluated_on_test_images():
    first, second = FashionPairs(count=200, test_count=100, seed=0), FashionPairs(count=200, test_count=100, seed=1)
    assert (first.num_classes, first.image_size, len(first.classes)) == (100, (28, 56), 100)
    assert first.classes[23] == f"{CLASSES[2]} and {CLASSES[3]}"

    def all_of(loader):
        batches = list(loader)
        return torch.cat([one[0] for one in batches]), torch.cat([one[1] for one in batches])

    (images, labels), (theirs, _) = all_of(first.val_dataloader()), all_of(second.val_dataloader())
    assert torch.equal(images, theirs)
    tests = read_fashion_part("test").images
    mean, std = first.mean[0], first.std[0]
    left = ((images[..., :28] * std + mean) * 255).round().to(torch.uint8)
    known = {bytes(one.contiguous().numpy()) for one in tests}
    assert all(bytes(one.contiguous().numpy()) in known for one in left)
    assert sorted(labels.tolist()) == list(range(100))
    held = hold_out(first, 0.25)
    assert len(all_of(held.train_dataloader())[1]) == 150


@pytest.mark.parametrize("counts", [{"count": 99}, {"test_count": 0}, {"count": -1}])
def test_too_few_pairs_are_refused(counts):
    with pytest.raises(ValueError, match="100 or more"):
        FashionPairs(**counts)


def test_the_whole_set_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt install"):
        FashionPairs(whole=True, root=tmp_path)
