import pytest
import torch

from diffkd.data import mix

# Image i is all i, so that a mixed image tells what it is made of.
IMAGES = torch.arange(8.0)[:, None, None, None].expand(8, 3, 10, 12).contiguous()
LABELS = torch.arange(8)


def test_off_means_one_hot_labels():
    images, targets = mix(IMAGES, LABELS, 10, seed=0)
    assert images is IMAGES
    assert torch.equal(targets, torch.eye(8, 10))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_labels_state_what_the_images_hold(alphas, seed):
    images, targets = mix(IMAGES, LABELS, 8, **alphas, seed=seed)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
    # Each image's mean value is that of its soft label, for pasted and for blended pixels.
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), targets @ torch.arange(8.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_pastes_one_rectangle(seed):
    images, _ = mix(IMAGES, LABELS, 8, cutmix=1.0, seed=seed)
    changed = (images != IMAGES)[:, 0]
    area = changed.sum(dim=(1, 2))
    assert torch.equal(area, changed.any(dim=1).sum(dim=1) * changed.any(dim=2).sum(dim=1))


def test_mixup_blends_evenly_over_the_image():
    images, _ = mix(IMAGES, LABELS, 8, mixup=1.0, seed=3)
    assert (images.amax(dim=(1, 2, 3)) == images.amin(dim=(1, 2, 3))).all()
    assert not torch.equal(images, IMAGES)


def test_both_on_take_turns():
    flat = [
        bool((mixed.amax(dim=(1, 2, 3)) == mixed.amin(dim=(1, 2, 3))).all())
        for mixed, _ in (mix(IMAGES, LABELS, 8, mixup=1.0, cutmix=1.0, seed=seed) for seed in range(60))
    ]
    assert 10 < sum(flat) < 50


def test_the_seed_decides_and_the_input_stays():
    before = IMAGES.clone()
    first, second = (mix(IMAGES, LABELS, 8, cutmix=1.0, seed=5) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(IMAGES, before)
