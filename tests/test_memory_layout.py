import pytest
import torch

from diffkd.memory_layout import fast_layout


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
