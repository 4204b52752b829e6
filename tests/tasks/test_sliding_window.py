import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffkd.tasks.segmentation import sliding_window

sizes = st.integers(1, 24)


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int]]:
    window = draw(sizes), draw(sizes)
    return window, (draw(st.integers(1, window[0])), draw(st.integers(1, window[1])))


@given(sizes, sizes, windows(), st.integers(0, 2))
def test_a_pointwise_model_gives_exactly_its_own_logits(
    height: int, width: int, cut: tuple[tuple[int, int], tuple[int, int]], batch: int
) -> None:
    images = torch.randn(batch, 3, height, width)
    images[:, 0] = float("-inf")  # a class that a model rules out

    def model(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0], x[:, 1] / 3], dim=1)

    result = sliding_window(model, images, window=cut[0], stride=cut[1], num_classes=2)
    assert torch.equal(result, model(images))


@given(sizes, sizes, windows())
def test_every_pixel_is_covered(height: int, width: int, cut: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """By a mean, over the windows it is in, of what each says: here the area of the window."""
    window = min(cut[0][0], height), min(cut[0][1], width)
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[-2:]))
        return torch.ones_like(x[:, :1])

    result = sliding_window(model, torch.zeros(1, 3, height, width), window=cut[0], stride=cut[1], num_classes=1)
    assert torch.equal(result, torch.ones(1, 1, height, width))
    assert set(seen) == {window}


@given(sizes, sizes)
def test_a_window_that_holds_the_image_gives_the_whole_result(height: int, width: int) -> None:
    conv, images = nn.Conv2d(3, 2, 5, padding=2), torch.randn(2, 3, height, width)
    result = sliding_window(conv, images, window=(24, 24), stride=(5, 5), num_classes=2)
    assert torch.equal(result, conv(images))


@given(st.integers(8, 24), st.integers(8, 24), st.integers(1, 7), st.integers(1, 8))
def test_a_local_model_agrees_away_from_the_borders_of_windows(height: int, width: int, down: int, right: int) -> None:
    conv, images = nn.Conv2d(3, 2, 3, padding=1).double(), torch.randn(1, 3, height, width).double()
    result = sliding_window(conv, images, window=(7, 8), stride=(down, right), num_classes=2)
    tops = {*range(0, height - 7, down), height - 7}
    lefts = {*range(0, width - 8, right), width - 8}
    # The border of a window is wrong unless it is that of the image too.
    rows = [y for y in range(height) if not any((y == t and t > 0) or (y == t + 6 < height - 1) for t in tops)]
    columns = [x for x in range(width) if not any((x == t and t > 0) or (x == t + 7 < width - 1) for t in lefts)]
    inside = torch.tensor(rows)[:, None], torch.tensor(columns)[None]
    if rows and columns:
        torch.testing.assert_close(result[..., inside[0], inside[1]], conv(images)[..., inside[0], inside[1]])


def test_overlaps_are_averaged() -> None:
    calls = iter([1.0, 2.0, 6.0])
    result = sliding_window(
        lambda x: torch.full_like(x[:, :1], next(calls)),
        torch.zeros(1, 3, 1, 5),
        window=(1, 3),
        stride=(1, 1),
        num_classes=1,
    )
    assert result.flatten().tolist() == [1, 1.5, 3, 4, 6]


def test_smaller_maps_and_mappings_and_half_precision() -> None:
    pool = nn.AvgPool2d(4)
    images = torch.randn(2, 3, 10, 9)
    result = sliding_window(lambda x: {"out": pool(x).half()}, images, window=(8, 8), stride=(4, 4), num_classes=3)
    assert (result.shape, result.dtype) == ((2, 3, 10, 9), torch.float32)


def test_no_gradients_are_recorded() -> None:
    result = sliding_window(nn.Conv2d(3, 2, 1), torch.ones(1, 3, 4, 5), window=(3, 3), stride=(2, 2), num_classes=2)
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": (0, 4)}, r"window \(0, 4\) covers nothing"),
        ({"stride": (4, 0)}, r"stride \(4, 0\) covers nothing"),
        ({"stride": (4, 5)}, r"stride \(4, 5\) steps over pixels"),
        ({"num_classes": 3}, "returned 2 classes, and num_classes is 3"),
        ({"images": torch.zeros(3, 8, 8)}, r"shape \(3, 8, 8\) cannot be segmented"),
        ({"images": torch.zeros(1, 3, 0, 8)}, "cannot be segmented"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments = {"images": torch.zeros(1, 3, 8, 8), "window": (4, 4), "stride": (2, 2), "num_classes": 2} | change
    with pytest.raises(ValueError, match=message):
        sliding_window(nn.Conv2d(3, 2, 1), **arguments)  # type: ignore[arg-type]
