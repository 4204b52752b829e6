import pytest
import torch
from torch import nn

from diffkd import FeatureShape
from diffkd.methods.inputs import align, embed, full_precision, labels_on_grid, like_parameters, unit


def test_unit_vectors_and_zero():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    y = unit(x)
    assert y.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
    (y * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert x.grad[1].tolist() == [3, 4]


def test_embeddings_are_means_in_float32():
    feature = torch.full((2, 3, 64, 64), 30.0, dtype=torch.float16)
    assert torch.equal(embed(feature), torch.full((2, 3), 30.0))
    assert embed(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_align_only_where_channels_differ():
    assert isinstance(align(FeatureShape(3, (2, 2)), FeatureShape(3, (2, 2))), nn.Identity)
    assert align(FeatureShape(3, (2, 2)), FeatureShape(4, (2, 2)))(torch.zeros(1, 3, 2, 2)).shape == (1, 4, 2, 2)
    assert align(FeatureShape(3), FeatureShape(4))(torch.zeros(1, 3)).shape == (1, 4)


def test_like_parameters():
    x = torch.zeros(1, dtype=torch.float16)
    assert like_parameters(x, nn.Linear(1, 1)).dtype == torch.float32
    assert like_parameters(x, nn.Identity()) is x


def test_products_keep_their_precision():
    a = torch.rand(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with full_precision(a):
            assert (a @ a).dtype == torch.float32


def test_labels_take_the_nearest():
    labels = torch.arange(24).reshape(1, 4, 6)
    assert labels_on_grid(labels, 2, 3).tolist() == [[[0, 2, 4], [12, 14, 16]]]
    assert labels_on_grid(labels + 250, 4, 6).equal(labels + 250)
