import pytest
import torch
from rounding import EXACT
from torch import nn

from diffkd.features.memory_layout import fast_layout, try_channels_last


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((2, 3, 16, 16), torch.contiguous_format, torch.channels_last),
        ((2, 3, 16, 17), torch.contiguous_format, torch.contiguous_format),
        ((2, 3, 16, 17), torch.channels_last, torch.channels_last),
        ((2, 3), torch.contiguous_format, torch.contiguous_format),
    ],
)
def test_small_maps_are_rows_and_large_ones_stay_as_they_are(shape, layout, expected):
    assert fast_layout(torch.zeros(shape).to(memory_format=layout)) == expected


def test_elsewhere_than_on_a_cpu_the_feature_decides():
    small = torch.zeros(2, 3, 4, 4, device="meta")
    assert fast_layout(small) == torch.contiguous_format
    assert fast_layout(small.to(memory_format=torch.channels_last)) == torch.channels_last


class Flattening(nn.Module):
    """Views its maps as one row per image, which needs the plain layout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).view(len(x), -1)


def is_channels_last(model):
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)


def test_a_model_is_laid_out_with_the_channels_last_and_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().train()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected, buffers = model.eval()(x), [buffer.clone() for buffer in model.train().buffers()]
        assert try_channels_last(model, x)
        assert model.training
        assert is_channels_last(model)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
        found = model.eval()(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    ("model", "size"),
    [(Flattening(), (2, 3, 9, 9)), (nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), (2, 3, 5, 5, 5))],
    ids=["a view", "three dimensions"],
)
def test_a_model_that_does_not_run_like_that_stays_as_it_was(model, size):
    x = torch.randn(size)
    expected = model(x)
    assert not try_channels_last(model, x)
    assert all(p.is_contiguous() for p in model.parameters())
    assert torch.equal(model(x), expected)
