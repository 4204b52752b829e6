import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as VF

from diffkd.data import Augmentation
from diffkd.data.classification.augmentation import (
    augment,
    color_jitter,
    normalise,
    random_crop,
    random_erasing,
    random_flip,
    to_float,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(batch=16, channels=3, height=9, width=7, seed=0):
    return torch.randint(256, (batch, channels, height, width), dtype=torch.uint8, generator=generator(seed))


@pytest.mark.parametrize("channels", [1, 3])
def test_each_crop_is_a_window_of_the_padded_image(channels):
    images, padding = pictures(channels=channels), 2
    cropped = random_crop(images, padding, generator())
    offsets = torch.randint(5, (2, len(images)), generator=generator())
    for image, crop, row, column in zip(images, cropped, *offsets.tolist(), strict=True):
        window = F.pad(image, [padding] * 4)[:, row : row + 9, column : column + 7]
        assert torch.equal(crop, window)


def test_all_crop_offsets_occur_and_vary_within_the_batch():
    marked = torch.zeros(500, 1, 5, 5)
    marked[:, :, 2, 2] = 1
    places = random_crop(marked, 2, generator()).flatten(1).argmax(dim=1)
    assert len(places.unique()) == 25


def test_flip_mirrors_about_half_of_the_images():
    images = pictures(batch=400)
    flipped = random_flip(images, generator())
    same = (flipped == images).flatten(1).all(dim=1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_erasing_fills_one_rectangle_of_the_promised_area():
    images = torch.full((300, 3, 20, 16), 7.0)
    changed = random_erasing(images, 0.5, generator()) != 7
    assert (changed == changed[:, :1]).all()  # all channels alike
    mask = changed[:, 0]
    area = mask.sum(dim=(1, 2))
    rectangle = mask.any(dim=2).sum(dim=1) * mask.any(dim=1).sum(dim=1)
    assert torch.equal(area, rectangle)
    assert 110 < (area > 0).sum() < 190
    fractions = area[area > 0] / (20 * 16)
    assert fractions.min() > 0.01
    assert fractions.max() < 0.4
    assert mask.any(dim=0).all()  # every pixel can be erased


def test_erasing_fills_with_standard_normal_noise_and_keeps_the_rest():
    images = torch.full((300, 1, 16, 16), 7.0)
    noise = (erased := random_erasing(images, 1.0, generator()))[erased != 7]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert torch.equal(random_erasing(images, 0.0, generator()), images)


def test_color_jitter_is_brightness_then_contrast_then_saturation():
    images = to_float(pictures(batch=6))
    factors = 1 + 0.4 * (2 * torch.rand(3, 6, generator=generator()) - 1)
    jittered = color_jitter(images, 0.4, generator())
    for image, result, (brightness, contrast, saturation) in zip(images, jittered, factors.T.tolist(), strict=True):
        reference = VF.adjust_brightness(image, brightness)
        reference = VF.adjust_saturation(VF.adjust_contrast(reference, contrast), saturation)
        torch.testing.assert_close(result, reference, atol=2e-3, rtol=0)


def test_color_jitter_leaves_the_saturation_of_grey_images():
    images = to_float(pictures(channels=1))
    assert color_jitter(images, 0.4, generator()).shape == images.shape
    assert torch.equal(color_jitter(images, 0.0, generator()), images)


def test_normalise_and_to_float():
    mean, std = torch.tensor([0.5])[:, None, None], torch.tensor([0.25])[:, None, None]
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert normalise(to_float(image), mean, std).flatten().tolist() == [-2.0, 2.0]
    assert to_float(torch.tensor([3.5], dtype=torch.float64)).item() == 3.5


EVERYTHING = Augmentation(crop_padding=2, flip=True, rand_augment=2, color_jitter=0.4, random_erasing=0.5)


def test_the_whole_chain_repeats_with_the_generator_and_draws_from_no_other():
    images, mean, std = pictures(), torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.2)
    state = torch.get_rng_state()
    first = augment(images, EVERYTHING, mean, std, generator(1))
    assert torch.equal(first, augment(images, EVERYTHING, mean, std, generator(1)))
    assert not torch.equal(first, augment(images, EVERYTHING, mean, std, generator(2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.float32
    assert first.shape == images.shape
    assert torch.equal(images, pictures())  # the data set itself is untouched


def test_no_augmentation_only_normalises():
    images, mean, std = pictures(), torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.2)
    assert torch.equal(augment(images, Augmentation(), mean, std, generator()), normalise(to_float(images), mean, std))
