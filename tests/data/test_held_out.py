"""A part of the training data held back."""

from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image

from diffkd.data import Arrays, DetectionScenes, ImageFolder, MaskFolder, SegmentationScenes, hold_out
from diffkd.data.held_out import stratified_split


def samples(loader):
    return [sample for batch in loader for sample in zip(*batch, strict=True)]


def test_arrays(image_files):
    data = Arrays(image_files["train"], image_files["test"], batch_size=7)
    part = hold_out(data, 0.2, seed=3)
    train, held = samples(part.train_dataloader()), samples(part.val_dataloader())
    assert Counter(int(label) for _, label, _ in held) == dict.fromkeys(range(6), 2)
    assert Counter(int(label) for _, label, _ in train) == dict.fromkeys(range(6), 8)
    whole = {tuple(image.flatten().tolist()) for image, _, _ in samples(data.train_dataloader())}
    ours = [tuple(image.flatten().tolist()) for image, _, _ in train + held]
    assert set(ours) == whole
    assert len(ours) == len(whole) == 60
    assert [int(index) for *_, index in samples(part.test_dataloader())] == list(range(12))
    assert (part.mean, part.classes, part.image_size) == (data.mean, data.classes, data.image_size)
    assert len(samples(data.val_dataloader())) == 36
    again, other = hold_out(data, 0.2, seed=3), hold_out(data, 0.2, seed=4)
    assert torch.equal(again._loaders.val.images, part._loaders.val.images)
    assert not torch.equal(other._loaders.val.images, part._loaders.val.images)


def write_folder(root):
    for split, count in (("train", 10), ("val", 2)):
        for name, level in (("a", 40), ("b", 200)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.full((8, 8, 3), level + index, dtype=np.uint8)
                pixels[:, 4:] = 0
                Image.fromarray(pixels).save(folder / f"{index}.png")


def test_folders_are_served_without_augmentation(tmp_path):
    write_folder(tmp_path)
    data = ImageFolder(tmp_path, image_size=8, crop_ratio=1.0, batch_size=4, num_workers=0)
    part = hold_out(data, 0.3, seed=1)
    held = samples(part.val_dataloader())
    assert Counter(int(label) for _, label, _ in held) == {0: 3, 1: 3}
    assert len(part._loaders.train) == 14
    assert all((image[:, :, :4] > image[:, :, 4:]).all() for image, _, _ in held)
    assert part.train_dataloader().digest != data.train_dataloader().digest


def test_detection_by_the_rarest_class():
    data = DetectionScenes(train_count=20, val_count=2, batch_size=4)
    part = hold_out(data, 0.25, seed=0)
    held = [target for _, targets, _ in part.val_dataloader() for target in targets]
    ids = {int(target["image_id"]) for target in held}
    assert 3 <= len(held) == len(ids) <= 7
    train = {int(target["image_id"]) for _, targets, _ in part.train_dataloader() for target in targets}
    assert not train & ids


def test_segmentation():
    data = SegmentationScenes(train_count=10, val_count=2, batch_size=4)
    part = hold_out(data, 0.2, seed=0)
    assert (len(part._loaders.train), len(part._loaders.val)) == (8, 2)
    assert not part._loaders.val.whole.flip
    assert part._loaders.train.whole.flip


def test_images_of_any_size_come_alone(tmp_path):
    for split in ("train", "val"):
        for index, size in enumerate([(8, 10), (12, 8), (8, 10), (9, 9)]):
            for folder, shape in (("images", (*size, 3)), ("masks", size)):
                (tmp_path / split / folder).mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(index).integers(0, 2, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / folder / f"{index}.png")
    data = MaskFolder(tmp_path, classes=["x", "y"], batch_size=2, crop_size=(8, 8), num_workers=0)
    part = hold_out(data, 0.5, seed=0)
    batches = list(part.val_dataloader())
    assert [len(images) for images, *_ in batches] == [1, 1]
    assert all(images.shape[2:] == masks.shape[1:] for images, masks, _ in batches)


@pytest.mark.parametrize(("share", "message"), [(0.0, "share=0.0"), (1.0, "share=1.0"), (0.001, "give another share")])
def test_a_share_that_leaves_nothing_is_refused(image_files, share, message):
    with pytest.raises(ValueError, match=message):
        hold_out(Arrays(image_files["train"], image_files["test"]), share)


def test_other_data_modules_are_refused():
    with pytest.raises(ValueError, match="LightningDataModule does not show its training images"):
        hold_out(LightningDataModule())


@pytest.mark.parametrize(("classes", "each", "share"), [(100, 2, 0.2), (40, 3, 0.1), (10, 2, 0.25), (7, 4, 0.1)])
def test_many_classes_of_few_images_give_one_in_turn(classes, each, share):
    labels = [index % classes for index in range(classes * each)]
    kept, held = stratified_split(labels, share, seed=0)
    assert abs(len(held) - share * len(labels)) <= 1
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert len({labels[index] for index in held}) == len(held)  # of different classes
    assert {labels[index] for index in kept} == set(labels)


def test_classes_of_one_image_keep_it():
    labels = [*range(20), *[20] * 20]
    kept, held = stratified_split(labels, 0.1, seed=1)
    assert [labels[index] for index in held] == [20, 20]
    assert len(kept) == 38
