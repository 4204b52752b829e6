from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import EXACT
from torch.nn import functional as F

from diffkd import Layout
from diffkd.features.layout import infer_layout, resize, select_tensor

SQUARE, WIDE = (224, 224), (96, 160)


@pytest.mark.parametrize(
    ("shape", "input_size", "expected"),
    [
        ((2, 512, 7, 7), SQUARE, Layout("nchw")),
        ((2, 7, 7, 768), SQUARE, Layout("nhwc")),
        ((2, 7, 7, 8), SQUARE, Layout("nhwc")),  # 7x8 positions are none of a square image
        ((2, 8, 7, 7), SQUARE, Layout("nchw")),
        ((2, 64, 1, 1), SQUARE, Layout("nchw")),
        ((2, 512, 3, 5), WIDE, Layout("nchw")),
        ((2, 3, 5, 512), WIDE, Layout("nhwc")),
        ((2, 512, 4, 5), (100, 150), Layout("nchw")),  # rounded up on one side
        ((2, 196, 192), SQUARE, Layout("tokens", 0, (14, 14))),
        ((2, 197, 192), SQUARE, Layout("tokens", 1, (14, 14))),
        ((2, 198, 192), SQUARE, Layout("tokens", 2, (14, 14))),
        ((2, 201, 192), SQUARE, Layout("tokens", 5, (14, 14))),
        ((2, 5, 192), SQUARE, Layout("tokens", 1, (2, 2))),
        ((2, 21, 192), SQUARE, Layout("tokens", 5, (4, 4))),  # not 1 + 4x5
        ((2, 61, 192), WIDE, Layout("tokens", 1, (6, 10))),
        ((2, 5 + 8 * 4, 192), (256, 128), Layout("tokens", 5, (8, 4))),  # not 1 + 9x4, which is longer than the image
        ((2, 7 * 5, 192), (224, 168), Layout("tokens", 0, (7, 5))),  # nothing says that there are 5 before 6x5
        ((2, 21, 192), (120, 100), None),  # 1 before 5x4 or 5 before 4x4, neither of exactly the image's proportions
        ((2, 10), SQUARE, Layout("vector")),
        ((2, 10), None, Layout("vector")),
        ((2, 8, 4, 5), None, Layout("nchw")),
        ((2, 197, 192), None, None),
        ((2, 32, 1), SQUARE, None),  # pooled over positions, not 32 of them
        ((2, 512, 7, 3), SQUARE, None),
        ((2, 3, 4, 5, 6), SQUARE, None),
        ((2,), SQUARE, None),
    ],
)
def test_layouts_are_told_from_shapes(shape, input_size, expected):
    assert infer_layout(shape, input_size) == expected


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("batch", [1, 2, 4, 16, 17])
def test_tokens_may_come_before_the_batch(prefix, batch):
    grid = torch.randn(batch, 3, 6, 6)
    tokens = torch.cat([torch.randn(prefix, batch, 3), grid.flatten(2).permute(2, 0, 1)])
    layout = infer_layout(tokens.shape, SQUARE, {prefix}, batch=batch)
    assert layout == Layout("sequence", prefix, (6, 6))
    assert torch.equal(layout.read(tokens), grid)
    assert layout.batch(tokens.shape) == batch
    assert infer_layout(tokens.transpose(0, 1).shape, SQUARE, {prefix}, batch=batch).kind == "tokens"


def test_the_models_word_on_prefix_tokens_counts():
    assert infer_layout((2, 196 + 4, 8), SQUARE, prefixes={4}) == Layout("tokens", 4, (14, 14))
    assert infer_layout((2, 196 + 4, 8), SQUARE, prefixes={1}) is None
    assert infer_layout((2, 196, 8), SQUARE, prefixes={1}) == Layout("tokens", 0, (14, 14))  # a layer before they come


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 8, 14, 14), Layout("nchw")),
        ((2, 14, 14, 8), Layout("nhwc")),
        ((2, 1 + 196, 8), Layout("tokens", 1, (14, 14))),
        ((2, 196, 8), Layout("tokens", 0, (14, 14))),  # before the class token comes
        ((2, 14, 3, 5), Layout("nchw")),  # exactly the proportions of the image
        ((2, 3, 13, 28), None),
    ],
)
def test_sizes_that_convolutions_return_come_before_rounded_proportions(shape, expected):
    assert infer_layout(shape, WIDE, {1}, {(14, 14)}) == expected


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.integers(21, 40),
    prefix=st.integers(0, 5),
    patch=st.integers(4, 16),
)
def test_grids_are_found_again(height, width, channels, prefix, patch):
    """Whatever the proportions, positions end up where they were, when the patch divides the image."""
    size = (height * patch, width * patch)
    grid = torch.randn(2, channels, height, width)
    assert infer_layout(grid.shape, size).read(grid) is grid
    last = grid.permute(0, 2, 3, 1)
    if channels * height != width * width:  # which are the proportions of the image as well
        assert torch.equal(infer_layout(last.shape, size).read(last), grid)
    tokens = torch.cat([torch.randn(2, prefix, channels), grid.flatten(2).transpose(1, 2)], dim=1)
    layout = infer_layout(tokens.shape, size, {prefix})
    assert torch.equal(layout.read(tokens), grid)
    assert layout.channels(tokens.shape) == channels
    assert layout.size(tokens.shape) == (height, width)


def test_tokens_of_another_image_size_keep_the_proportions():
    layout = Layout("tokens", 1, (3, 5))
    assert layout.read(torch.randn(2, 1 + 60, 8)).shape == (2, 8, 6, 10)
    with pytest.raises(ValueError, match="61 tokens do not fill a grid of the proportions 3x5; probe the models"):
        layout.read(torch.randn(2, 1 + 61, 8))


def test_shapes_by_layout():
    assert Layout("nhwc").channels((2, 3, 5, 9)) == 9
    assert Layout("nhwc").size((2, 3, 5, 9)) == (3, 5)
    assert Layout("nchw").size((2, 9, 3, 5)) == (3, 5)
    assert Layout("vector").size((2, 9)) == ()
    assert [str(Layout("tokens", 2, (3, 3))), str(Layout("nhwc"))] == ["tokens+2", "nhwc"]


T = [torch.tensor(float(i)) for i in range(4)]
LOGITS = torch.zeros(2, 10)


@pytest.mark.parametrize(
    ("output", "key", "expected"),
    [
        (T[0], None, T[0]),
        ((T[0], T[1]), None, T[0]),
        ([None, "text", (T[1],)], None, T[1]),
        ({"aux": T[0], "out": T[1]}, None, T[1]),
        ({"aux": T[0], "logits": T[1], "out": T[2]}, None, T[1]),
        (OrderedDict(last=T[2]), None, T[2]),
        ((T[0], LOGITS), None, LOGITS),  # a loss, and the logits
        ({"loss": T[0], "scores": LOGITS}, None, LOGITS),
        (([torch.zeros(2, 4, 8, 8), torch.zeros(2, 8)], LOGITS), None, LOGITS),  # features in a list, and the logits
        ({"maps": {"0": torch.zeros(2, 4, 8, 8)}, "scores": LOGITS}, None, LOGITS),
        ({"hidden": LOGITS, "logits": T[1]}, None, T[1]),
        (SimpleNamespace(logits=T[3]), None, T[3]),
        ((T[0], T[1]), "1", T[1]),
        ((T[0], T[1]), "-1", T[1]),
        ({"0": T[0], "pool": T[1]}, "pool", T[1]),
        ({0: T[0], 1: T[1]}, "1", T[1]),
        ((T[0], {"x": T[2]}), "1", T[2]),
        ((T[0],), "7", None),
        (T[0], "0", None),
        ((T[0],), "x", None),
        ({"x": T[0]}, "y", None),
        (None, None, None),
        ("text", None, None),
        ([], None, None),
        (3, "0", None),
    ],
)
def test_tensors_are_found_in_outputs(output, key, expected):
    assert select_tensor(output, key) is expected


def test_resizing():
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    assert resize(x, (8, 6)) is x
    torch.testing.assert_close(resize(x, (4, 3)), F.avg_pool2d(x, 2), **EXACT)
    assert resize(x, (16, 9)).shape == (2, 3, 16, 9)
    assert resize(x, (16, 3)).shape == (2, 3, 16, 3)
    constant = torch.full((1, 1, 5, 5), 3.0)
    for size in ((2, 2), (9, 9), (3, 8)):
        torch.testing.assert_close(resize(constant, size), torch.full((1, 1, *size), 3.0))
