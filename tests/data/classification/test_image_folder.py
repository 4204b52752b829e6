import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.commands.evaluate import data_of
from diffkd.data import Augmentation, ImageFolder
from diffkd.data.classification.image_folder import eval_transform
from diffkd.data.image_data import allow_missing_training_images
from diffkd.data.splits import choose_split
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from diffkd.files.config import describe

EVERYTHING = Augmentation(flip=True, rand_augment=2, color_jitter=0.4, random_erasing=0.5)


@pytest.fixture
def root(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = random.integers(0, 100, (30, 40, 3), dtype=np.uint8) + 100 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path


def module(root, **options):
    return ImageFolder(root, **({"batch_size": 4, "image_size": 16, "num_workers": 0, "seed": 3} | options))


def same(first, second):
    assert len(first) == len(second) > 0
    for left, right in zip(first, second, strict=True):
        for one, other in zip(left, right, strict=True):
            assert torch.equal(one, other)


def test_the_module_says_what_it_is(root):
    data = module(root)
    assert (data.classes, data.num_classes, data.in_channels, data.image_size) == (("cat", "dog"), 2, 3, (16, 16))
    assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert data.example().shape == (2, 3, 16, 16)
    assert data.skipped == []


def test_data_of_a_run_from_python_can_be_made_again(root):
    data = module(root, augmentation=EVERYTHING, crop_ratio=0.8)
    again = data_of(json.loads(json.dumps({"data": describe(data)})))
    assert (again.image_size, again.augmentation) == ((16, 16), EVERYTHING)
    same(list(data.val_dataloader()), list(again.val_dataloader()))


@pytest.fixture
def flat(root):
    """The class folders in the root itself."""
    for name in ("cat", "dog"):
        (root / "train" / name).rename(root / name)
    shutil.rmtree(root / "val")
    (root / "train").rmdir()
    (root / "readme.txt").touch()
    return root


def test_class_folders_in_the_root_are_split_by_a_share(flat):
    data = module(flat, val_share=0.2)
    assert data.classes == ("cat", "dog")
    counts = [sum(len(batch[1]) for batch in loader()) for loader in (data.train_dataloader, data.val_dataloader)]
    assert counts == [8, 2]
    same(list(data.val_dataloader()), list(module(flat, val_share=0.2).val_dataloader()))
    assert choose_split(data)[0] == "val"


def test_without_a_share_it_is_named(flat):
    with pytest.raises(FileNotFoundError, match=r"train: no such folder, but .* 'cat', 'dog'; .*set val_share=0\.2"):
        module(flat)


@pytest.mark.parametrize("other", ["test", "images", "Labels", "val"])
def test_a_root_with_other_folders_is_no_set_of_class_folders(flat, other):
    shutil.copytree(flat / "cat", flat / other)
    with pytest.raises(FileNotFoundError, match="train: no such folder; give a root with train/<class>"):
        module(flat, val_share=0.2)


def test_folders_of_folders_and_a_single_folder_are_no_class_folders(flat):
    (flat / "cat").rename(flat / "art")
    (flat / "art" / "cat").mkdir()
    for path in list((flat / "art").glob("*.png")):
        path.rename(flat / "art" / "cat" / path.name)
    with pytest.raises(FileNotFoundError, match="train: no such folder; give a root"):
        module(flat, val_share=0.2)
    with pytest.raises(FileNotFoundError, match="train: no such folder; give a root"):
        module(flat / "art", val_share=0.2)


def test_a_folder_of_training_images_comes_first(root):
    shutil.copytree(root / "train" / "cat", root / "bird")
    assert module(root, val_share=0.2).classes == ("cat", "dog")


def test_class_folders_are_evaluated_whole_where_they_are_some_of_the_classes(flat):
    with allow_missing_training_images(("bird", "cat", "dog")):
        data = module(flat, val_share=0.2)
    assert data.classes == ("bird", "cat", "dog")
    assert sum(len(batch[1]) for batch in data.val_dataloader()) == 10
    with allow_missing_training_images(("cat", "dog")):
        held = module(flat, val_share=0.2)
    same(list(held.val_dataloader()), list(module(flat, val_share=0.2).val_dataloader()))


def test_evaluation_is_resize_centre_crop_normalise(root):
    data = module(root, crop_ratio=0.8)
    batches = list(data.val_dataloader())
    assert [len(batch[1]) for batch in batches] == [4, 2]
    images, labels, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert indices.tolist() == list(range(6))
    with Image.open(root / "val" / "dog" / "2.png") as image:
        resized = np.asarray(image.resize((26, 20), Image.Resampling.BILINEAR))[2:18, 5:21]
    expected = (torch.from_numpy(resized.copy()) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(images[5], expected.permute(2, 0, 1))


@pytest.mark.parametrize("turned", [False, True])
def test_strips_are_cut_before_they_are_scaled(turned):
    ramp = np.linspace(0, 255, 32000).round().astype(np.uint8)
    strip = Image.fromarray(np.stack([ramp] * 2)).convert("RGB")
    if turned:
        strip = strip.transpose(Image.Transpose.ROTATE_270)
    transform = eval_transform(32, 0.5, (0, 0, 0), (1, 1, 1))
    sizes = []
    transform.transforms[2].register_forward_pre_hook(lambda _, inputs: sizes.append(max(inputs[0].size)))
    image = transform(strip)
    assert image.shape == (3, 32, 32)
    assert (image - 0.5).abs().max() < 0.01  # the middle of the ramp
    assert sizes == [16 * 64]


def test_training_labels_follow_the_indices(root):
    data = module(root)
    indices = []
    for images, labels, chosen in data.train_dataloader():
        assert images.shape[1:] == (3, 16, 16)
        assert labels.tolist() == [index // 5 for index in chosen.tolist()]
        assert ((images.mean(dim=(1, 2, 3)) > 0.3) == (labels == 1)).all()  # class 1 is the brighter one
        indices += chosen.tolist()
    assert sorted(indices) == list(range(10))


def test_results_do_not_depend_on_the_number_of_workers(root):
    state = torch.get_rng_state()
    alone = module(root, augmentation=EVERYTHING).train_dataloader()
    helped = module(root, augmentation=EVERYTHING, num_workers=2).train_dataloader()
    epochs = []
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        epochs.append(list(alone))
        same(epochs[-1], list(helped))
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resume_in_mid_epoch_goes_on_bit_for_bit(root):
    whole, resumed = module(root, augmentation=EVERYTHING), module(root, augmentation=EVERYTHING)
    resumed.start_batch = 1
    first, second = whole.train_dataloader(), resumed.train_dataloader()
    batches = iter(second)  # Lightning asks for the iterator before it sets the epoch
    first.set_epoch(2)
    second.set_epoch(2)
    assert len(first) == len(second) == 3
    same(list(first)[1:], list(batches))
    for loader in (first, second):
        loader.set_epoch(3)
    same(list(first), list(second))


def broken(root, split="train", name="cat/1.png"):
    path = root / split / name
    path.write_bytes(path.read_bytes()[:-200])
    return path


def test_a_broken_image_stops_with_its_name(root):
    path = broken(root)
    with pytest.raises(ValueError, match=rf"{path} cannot be read"):
        list(module(root).train_dataloader())


def test_verify_finds_a_broken_image_before_training(root):
    path = broken(root, "val", "dog/0.png")
    with pytest.raises(ValueError, match=rf"val: 1 of 6 images are broken.*{path}"):
        module(root, verify=True)


def test_a_misspelt_choice_is_refused(root):
    with pytest.raises(ValueError, match="on_bad_image='Skip': give 'error' or 'skip'"):
        module(root, on_bad_image="Skip")


def test_skip_leaves_broken_images_out_and_says_so(root):
    paths = [broken(root), broken(root, name="dog/4.png")]
    with pytest.warns(UserWarning, match="train: 2 of 10 images are left out") as warned:
        data = module(root, on_bad_image="skip")
    assert "on_bad_image" not in str(warned[0].message)  # which is set already
    assert len(data.skipped) == 2
    assert all(str(path) in message for path, message in zip(paths, data.skipped, strict=True))
    labels = torch.cat([batch[1] for batch in data.train_dataloader()])
    assert labels.sort().values.tolist() == [0] * 4 + [1] * 4
    assert len(torch.cat([batch[2] for batch in data.val_dataloader()])) == 6


def test_skip_does_not_empty_a_class_of_training(root):
    for index in range(5):
        broken(root, "train", f"cat/{index}.png")
    with (
        pytest.warns(UserWarning, match="5 of 10 images are left out"),
        pytest.raises(ValueError, match=r"train: no readable image of class\(es\) 'cat' is left"),
    ):
        module(root, on_bad_image="skip")


def test_classes_that_are_not_measured_are_named(root):
    for index in range(3):
        (root / "val" / "cat" / f"{index}.png").unlink()
    with pytest.warns(UserWarning, match=r"val: no image of class\(es\) 'cat'"):
        data = module(root)
    assert [batch[1].tolist() for batch in data.val_dataloader()] == [[1, 1, 1]]
    (root / "val" / "dog" / "0.png").write_bytes(b"x")
    (root / "val" / "dog" / "1.png").write_bytes(b"x")
    (root / "val" / "dog" / "2.png").write_bytes(b"x")
    with (
        pytest.warns(UserWarning, match="3 of 3 images are left out"),
        pytest.raises(ValueError, match="val: no readable image is left"),
    ):
        module(root, on_bad_image="skip")


def test_an_empty_file_is_refused_at_once(root):
    path = root / "val" / "cat" / "1.png"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{path} is empty"):
        module(root)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_mixed_kinds_of_images_batch_together(root, mode):
    path = root / "val" / "cat" / "1.png"
    with Image.open(path) as image:
        path.unlink()
        grey = np.asarray(image.convert("L"))
        other = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    other.save(path.with_suffix(".tif"))
    images, _, _ = next(iter(module(root).val_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert (images[1].mean() - images[0].mean()).abs() < 0.5  # as bright as its neighbour of the same class


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": Augmentation(crop_padding=4)}, "crop_padding"),
        ({"min_crop_area": 0.0}, "min_crop_area=0.0"),
        ({"mean": (0.5,), "std": (0.5,)}, r"mean=\(0.5,\) and std=\(0.5,\): give 3 value"),
        ({"std": (0.5, -0.5, 0.5)}, "std above 0"),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "divided by 255"),
        ({"crop_ratio": 1.5}, "crop_ratio=1.5"),
        ({"image_size": 0}, "image_size=0"),
    ],
)
def test_options_out_of_range_are_refused(root, options, message):
    with pytest.raises(ValueError, match=message):
        module(root, **options)
