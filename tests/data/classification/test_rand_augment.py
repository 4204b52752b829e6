import math

import pytest
import torch
from torchvision.transforms.v2 import functional as VF

from diffkd.data.classification.rand_augment import apply_operations, rand_augment

STRENGTH = 0.3  # magnitude 9 of 30
DEGREES = math.degrees(math.atan(0.3 * STRENGTH))


def affine(image, **values):
    return VF.affine(image, **({"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | values))


REFERENCES = {
    0: lambda image, sign: image,
    1: lambda image, sign: affine(image, shear=[sign * DEGREES, 0.0], center=[0, 0]),
    2: lambda image, sign: affine(image, shear=[0.0, sign * DEGREES], center=[0, 0]),
    3: lambda image, sign: affine(image, translate=[int(150 / 331 * image.shape[2] * STRENGTH * sign), 0]),
    4: lambda image, sign: affine(image, translate=[0, int(150 / 331 * image.shape[1] * STRENGTH * sign)]),
    5: lambda image, sign: VF.rotate(image, angle=30 * STRENGTH * sign),
    6: lambda image, sign: VF.adjust_brightness(image, 1 + 0.9 * STRENGTH * sign),
    7: lambda image, sign: VF.adjust_saturation(image, 1 + 0.9 * STRENGTH * sign),
    8: lambda image, sign: VF.adjust_contrast(image, 1 + 0.9 * STRENGTH * sign),
    9: lambda image, sign: VF.adjust_sharpness(image, 1 + 0.9 * STRENGTH * sign),
    10: lambda image, sign: VF.posterize(image, bits=round(8 - 4 * STRENGTH)),
    11: lambda image, sign: VF.solarize(image, threshold=255 * (1 - STRENGTH)),
    12: lambda image, sign: VF.autocontrast(image),
    13: lambda image, sign: VF.equalize(image),
}


def pictures(channels):
    noise = torch.rand(4, channels, 23, 34, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0.1, 0.8, 34).expand(23, 34)
    return ((0.4 * noise + 0.6 * ramp) * 255).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("operation", sorted(REFERENCES))
def test_each_operation_is_torchvisions(operation, sign, channels):
    images = pictures(channels)
    result = apply_operations(images, torch.full((4,), operation), torch.full((4,), sign), magnitude=9)
    expected = torch.stack([REFERENCES[operation](image, sign) for image in images])
    assert result.dtype == torch.uint8
    difference = (result.int() - expected.int()).abs()
    if operation in range(1, 6):  # nearest pixels may fall on either side of a tie
        assert (difference > 0).float().mean() < 0.01
    else:
        assert difference.max() <= 1


def test_each_image_gets_the_operation_it_chose():
    images = pictures(3)
    chosen, sign = torch.tensor([0, 5, 11, 13]), torch.tensor([1.0, -1.0, 1.0, 1.0])
    together = apply_operations(images, chosen, sign, magnitude=9)
    for index in range(4):
        alone = apply_operations(images[index : index + 1], chosen[index : index + 1], sign[index : index + 1], 9)
        assert torch.equal(together[index], alone[0])


def test_flat_images_survive_autocontrast_and_equalize():
    flat = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(apply_operations(flat, torch.tensor([12, 13]), torch.ones(2), 9), flat)


def test_tiny_images_pass_through_every_operation():
    tiny = torch.arange(14, dtype=torch.uint8).view(14, 1, 1, 1)
    assert apply_operations(tiny, torch.arange(14), torch.ones(14), 30).shape == tiny.shape


def test_magnitude_zero_leaves_geometry_and_colour():
    images = pictures(3)[:1].repeat(12, 1, 1, 1)
    assert torch.equal(apply_operations(images, torch.arange(12), torch.ones(12), magnitude=0)[:11], images[:11])


def test_draws_differ_between_images_and_repeat_with_the_generator():
    images = pictures(3)[:1].repeat(64, 1, 1, 1)
    first = rand_augment(images, 2, 9, torch.Generator().manual_seed(4))
    assert torch.equal(first, rand_augment(images, 2, 9, torch.Generator().manual_seed(4)))
    assert len(first.flatten(1).unique(dim=0)) > 30
