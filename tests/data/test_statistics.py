import torch

from diffkd.data.statistics import channel_statistics


def test_histograms_agree_with_the_definition():
    images = torch.randint(256, (30, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scaled = images.double() / 255
    mean, std = channel_statistics(images)
    torch.testing.assert_close(torch.tensor(mean).double(), scaled.mean(dim=(0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(std).double(), scaled.std(dim=(0, 2, 3), correction=0), atol=1e-6, rtol=0)


def test_floats_keep_their_unit():
    mean, std = channel_statistics(torch.tensor([1000.0, 3000.0]).view(2, 1, 1, 1))
    assert (mean, std) == ((2000.0,), (1000.0,))


def test_a_constant_channel_can_be_divided_by():
    assert channel_statistics(torch.zeros(2, 1, 3, 3, dtype=torch.uint8)) == ((0.0,), (1.0,))
