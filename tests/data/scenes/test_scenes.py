import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffkd.data.classification.fashion_mnist import CLASSES, read_fashion_subset
from diffkd.data.scenes.composition import SceneOptions, cluttered_background, make_scene, make_scenes, read_garments

CROWDED = SceneOptions((96, 128), min_objects=8, max_objects=12)
GARMENTS = {split: read_garments(split, CROWDED) for split in ("train", "val")}


def box_of(mask):
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]


@given(st.integers(0, 2**40), st.integers(1, 80), st.integers(1, 80), st.sampled_from(["train", "val"]))
def test_boxes_masks_and_classes_tell_the_same(seed, height, width, split):
    options = dataclasses.replace(CROWDED, size=(height, width))
    scene = make_scene(seed, 0, GARMENTS[split], options)
    count = len(scene.labels)
    assert scene.image.shape == (3, height, width)
    assert scene.image.dtype == torch.uint8
    assert scene.boxes.shape == (count, 4)
    assert scene.boxes.dtype == torch.float32
    assert scene.instances.shape == (count, height, width)
    assert scene.class_mask.dtype == torch.uint8
    assert count <= 12
    assert (scene.instances.sum(0) <= 1).all()
    painted = (scene.instances * scene.labels[:, None, None]).sum(0)
    assert torch.equal(painted, scene.class_mask.long())
    for box, mask in zip(scene.boxes.tolist(), scene.instances, strict=True):
        assert box == box_of(mask)


def test_a_scene_follows_from_its_numbers_alone():
    scenes = list(make_scenes(5, "train", 4, CROWDED))
    again = make_scene(5, 3, GARMENTS["train"], CROWDED)
    assert all(torch.equal(one, other) for one, other in zip(scenes[3], again, strict=True))
    for seed, index, split in ((6, 3, "train"), (5, 2, "train"), (5, 3, "val")):
        other = make_scene(seed, index, GARMENTS[split], CROWDED)
        assert not torch.equal(again.image, other.image)


def test_training_and_evaluation_use_different_garments():
    train, test = read_fashion_subset()
    assert [len(images) for images in GARMENTS["train"].images] == [800] * 10
    assert [len(images) for images in GARMENTS["val"].images] == [200] * 10
    assert np.array_equal(GARMENTS["train"].images[4], train.images[train.labels == 4, 0])
    assert np.array_equal(GARMENTS["val"].images[9], test.images[test.labels == 9, 0])


def test_later_objects_hide_earlier_ones_and_what_hides_too_much_is_gone():
    options = dataclasses.replace(CROWDED, min_scale=0.9, max_scale=1.0, min_visible=0.5, noise=0.0)
    scene = make_scene(1, 0, GARMENTS["train"], options)
    assert 0 < len(scene.labels) < 8  # eight of nearly the scene's size cannot all be half visible
    strict = dataclasses.replace(options, min_visible=1.0)
    whole = make_scene(1, 0, GARMENTS["train"], strict)
    assert len(whole.labels) == 1  # the front one is drawn first, and nothing fits beside it
    assert torch.equal(whole.instances[0], scene.instances[-1])
    outside = ~scene.instances.any(0) & ~whole.instances.any(0)
    assert torch.equal(whole.image[:, outside], scene.image[:, outside])  # what was dropped left no pixel behind


def test_objects_are_small_medium_and_large():
    areas = torch.cat([scene.instances.flatten(1).sum(1) for scene in make_scenes(0, "val", 60, SceneOptions())])
    small, large = areas < 32**2, areas > 96**2
    assert min(small.sum(), large.sum(), (~small & ~large).sum()) >= 5


def test_chosen_classes_are_labelled_in_their_order():
    options = SceneOptions((64, 64), classes=["Trouser", 8], noise=0.0)
    assert options.class_names() == ("Trouser", "Bag")
    garments = read_garments("train", options)
    assert np.array_equal(garments.images[1], GARMENTS["train"].images[8])
    labels = torch.cat([make_scene(0, index, garments, options).labels for index in range(20)])
    assert set(labels.tolist()) == {1, 2}
    assert SceneOptions().class_names() == CLASSES


def test_a_scene_may_be_empty():
    scene = make_scene(0, 0, GARMENTS["train"], dataclasses.replace(CROWDED, min_objects=0, max_objects=0))
    assert (scene.boxes.shape, scene.instances.shape) == ((0, 4), (0, 96, 128))
    assert not scene.class_mask.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": (0, 5)}, r"scene size \(0, 5\)"),
        ({"size": (5,)}, r"scene size \(5,\)"),
        ({"classes": ()}, "at least one"),
        ({"classes": ("Bag", 8)}, "each of them once"),
        ({"classes": ("Bags",)}, "'Bags' is not in Fashion-MNIST; nearest: 'Bag'"),
        ({"classes": (10,)}, "class 10 is not"),
        ({"min_objects": 4, "max_objects": 3}, "min_objects=4 and max_objects=3"),
        ({"min_scale": 0.0}, "min_scale=0.0"),
        ({"min_visible": 0.0}, "min_visible=0.0"),
        ({"noise": 2.0}, "noise=2.0"),
    ],
)
def test_options_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SceneOptions(**values)


def test_unknown_splits_and_no_scenes_are_refused():
    with pytest.raises(ValueError, match="split 'test' is none of 'train', 'val'"):
        read_garments("test", CROWDED)
    with pytest.raises(ValueError, match="0 val scenes"):
        make_scenes(0, "val", 0, CROWDED)


@given(st.integers(0, 2**30), st.integers(1, 60), st.integers(1, 60))
def test_backgrounds_are_pictures_of_any_size(seed, height, width):
    canvas = cluttered_background((height, width), np.random.default_rng(seed))
    assert canvas.shape == (height, width, 3)
    assert canvas.dtype == np.float32
    assert canvas.min() >= 0
    assert canvas.max() <= 255
