"""The first weights of the rivals' own layers: normal with variance 2 / fan-out, as in their authors' code."""

import pytest
import torch
from torch import nn

from diffkd import OFD, SRRL, FeatureShape, MasKD

NARROW, WIDE = FeatureShape(64, (4, 4)), FeatureShape(128, (4, 4))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: OFD([NARROW], [WIDE]), ["connectors.0.0"]),
        (lambda: SRRL(NARROW, WIDE), ["connector.0"]),
        (lambda: MasKD(NARROW, WIDE, tokens=64), ["weighting.0", "weighting.2"]),
    ],
    ids=["ofd", "srrl", "maskd"],
)
def test_variance(build, names):
    torch.manual_seed(0)
    method = build()
    for name in names:
        layer = method.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        ratio = layer.weight.std() / (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
        # Six standard errors of the deviation of n normal values, each 1 / sqrt(2 n).
        assert abs(ratio.item() - 1) < 6 / (2 * layer.weight.numel()) ** 0.5
        assert layer.bias is None or not layer.bias.any()


def test_tokens_start_small():
    torch.manual_seed(0)
    tokens = MasKD(NARROW, WIDE, tokens=64).tokens
    assert abs(tokens.std().item() / 0.01 - 1) < 6 / (2 * tokens.numel()) ** 0.5
