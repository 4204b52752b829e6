import inspect

import pytest
import torch

from diffkd.data import DetectionScenes, SegmentationScenes
from diffkd.data.scenes.composition import SceneOptions, make_scenes
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from diffkd.files.config import describe

SMALL = {"train_count": 7, "val_count": 3, "size": (48, 64), "batch_size": 2, "seed": 4, "classes": ("Bag", "Trouser")}
OPTIONS = SceneOptions((48, 64), ("Bag", "Trouser"))


def batches(loader, epoch=0):
    loader.set_epoch(epoch)
    return list(loader)


def flat(batch):
    """Return a batch as a flat list of tensors."""
    images, targets, indices = batch
    parts = [*images, indices]
    for target in targets:
        parts += target.values() if isinstance(target, dict) else [target]
    return parts


def same(first, second):
    assert len(first) == len(second) > 0
    for left, right in zip(first, second, strict=True):
        for one, other in zip(flat(left), flat(right), strict=True):
            assert torch.equal(one, other)


def test_the_detection_module_says_what_it_is():
    data = DetectionScenes(**SMALL)
    assert (data.task, data.classes, data.num_classes) == ("detection", ("Bag", "Trouser"), 2)
    assert (data.in_channels, data.image_size, data.min_size, data.max_size) == (3, (48, 64), 48, 64)
    example = data.example()
    assert [image.shape for image in example] == [(3, 48, 64)] * 2
    assert all(image.min() >= 0 and image.max() <= 1 for image in example)


def test_the_segmentation_module_says_what_it_is():
    data = SegmentationScenes(**SMALL)
    assert (data.task, data.classes, data.num_classes) == ("segmentation", ("background", "Bag", "Trouser"), 3)
    assert (data.in_channels, data.image_size, data.ignore_index) == (3, (48, 64), 255)
    assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert data.example().shape == (2, 3, 48, 64)


@pytest.mark.parametrize("module", [DetectionScenes, SegmentationScenes])
def test_a_record_of_the_arguments_makes_the_same_data(module):
    data = module(**SMALL)
    record = describe(data)["init_args"]
    assert list(record) == list(inspect.signature(module).parameters)
    same(batches(data.train_dataloader()), batches(module(**record).train_dataloader()))


def test_detection_batches_hold_the_scenes():
    data = DetectionScenes(**SMALL, flip=False)
    for loader, split, count in ((data.val_dataloader(), "val", 3), (data.train_dataloader(), "train", 7)):
        scenes, seen = list(make_scenes(4, split, count, OPTIONS)), []
        for images, targets, indices in batches(loader):
            assert indices.dtype == torch.int64
            seen += indices.tolist()
            for image, target, index in zip(images, targets, indices.tolist(), strict=True):
                scene = scenes[index]
                assert torch.equal(image, scene.image.float() / 255)
                assert torch.equal(target["boxes"], scene.boxes)
                assert torch.equal(target["labels"], scene.labels)
                assert target["area"].tolist() == scene.instances.flatten(1).sum(1).tolist()
                assert not target["iscrowd"].any()
                assert target["image_id"].item() == index
        assert sorted(seen) == list(range(count))


def test_segmentation_batches_hold_the_scenes():
    data = SegmentationScenes(**SMALL, flip=False, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    scenes = list(make_scenes(4, "val", 3, OPTIONS))
    images, masks, indices = (torch.cat(parts) for parts in zip(*batches(data.val_dataloader()), strict=True))
    assert indices.tolist() == [0, 1, 2]
    assert masks.dtype == torch.int64
    assert torch.equal(masks, torch.stack([scene.class_mask for scene in scenes]).long())
    back = images * torch.tensor([0.25, 0.5, 1.0])[:, None, None] + 0.5
    torch.testing.assert_close(back, torch.stack([scene.image for scene in scenes]).float() / 255)


def test_a_flip_turns_image_and_boxes_alike():
    plain, flipping = (DetectionScenes(**SMALL, flip=flip) for flip in (False, True))
    turned = 0
    for epoch in range(3):
        pairs = zip(batches(plain.train_dataloader(), epoch), batches(flipping.train_dataloader(), epoch), strict=True)
        for (images, targets, _), (others, others_targets, _) in pairs:
            for image, target, other, other_target in zip(images, targets, others, others_targets, strict=True):
                left, top, right, bottom = target["boxes"].unbind(1)
                if torch.equal(image, other):
                    assert torch.equal(target["boxes"], other_target["boxes"])
                else:
                    turned += 1
                    assert torch.equal(image.flip(-1), other)
                    expected = torch.stack([64 - right, top, 64 - left, bottom], 1)
                    assert torch.equal(other_target["boxes"], expected)
    assert 5 <= turned <= 16  # of 21


@pytest.mark.parametrize("module", [DetectionScenes, SegmentationScenes])
def test_the_sizes_of_objects_are_chosen(module):
    options = SceneOptions((48, 64), ("Bag", "Trouser"), min_scale=0.7, max_scale=0.8)
    scenes = list(make_scenes(4, "val", 3, options))
    seen = 0
    for _, targets, indices in batches(module(**SMALL, min_scale=0.7, max_scale=0.8).val_dataloader()):
        for target, index in zip(targets, indices.tolist(), strict=True):
            if isinstance(target, dict):
                assert torch.equal(target["boxes"], scenes[index].boxes)
            else:
                assert torch.equal(target, scenes[index].class_mask.long())
            seen += 1
    assert seen == 3


def test_a_flip_turns_image_and_mask_alike():
    plain, flipping = (SegmentationScenes(**SMALL, flip=flip) for flip in (False, True))
    turned = 0
    for epoch in range(3):
        pairs = zip(batches(plain.train_dataloader(), epoch), batches(flipping.train_dataloader(), epoch), strict=True)
        for (images, masks, _), (others, others_masks, _) in pairs:
            for image, mask, other, other_mask in zip(images, masks, others, others_masks, strict=True):
                flipped = not torch.equal(image, other)
                turned += flipped
                assert torch.equal(image.flip(-1) if flipped else image, other)
                assert torch.equal(mask.flip(-1) if flipped else mask, other_mask)
    assert 5 <= turned <= 16


@pytest.mark.parametrize("module", [DetectionScenes, SegmentationScenes])
def test_a_resume_in_mid_epoch_goes_on_bit_for_bit(module):
    whole, resumed = module(**SMALL), module(**SMALL)
    resumed.start_batch = 1
    first, second = whole.train_dataloader(), resumed.train_dataloader()
    assert len(first) == len(second)
    same(batches(first, 2)[1:], batches(second, 2))
    same(batches(first, 3), batches(second, 3))
