from math import exp, log

import pytest
import torch

from diffkd import FeatureShape
from diffkd.methods.vid import VID


@pytest.mark.parametrize("size", [(), (3, 5), (1, 1)])
def test_formula(agree, size):
    batch, ours, theirs = 3, 2, 4
    method = VID(FeatureShape(ours, size), FeatureShape(theirs, size), hidden_channels=6).double()
    with torch.no_grad():
        method.alpha.copy_(torch.randn(theirs))
    student = torch.randn(batch, ours, *size, dtype=torch.float64)
    teacher = torch.randn(batch, theirs, *size, dtype=torch.float64)

    def reference(s, t):
        columns = s.reshape(batch, ours, -1).permute(0, 2, 1).reshape(-1, ours)
        target = t.reshape(batch, theirs, -1).permute(0, 2, 1).reshape(-1, theirs)
        assert all(layer.bias is None for layer in method.regression[::2])
        for i, layer in enumerate(method.regression[::2]):
            columns = columns @ layer.weight.reshape(layer.weight.shape[:2]).T
            columns = columns.clamp(min=0) if i < 2 else columns
        total = 0.0
        for c in range(theirs):
            sigma = (torch.log(1 + method.alpha[c].exp()) + 1e-5).sqrt()
            total = total + ((target[:, c] - columns[:, c]) ** 2 / (2 * sigma**2) + sigma.log()).sum()
        return total / target.numel()

    agree(lambda s, t: method(s, t)["kd"], reference, student, teacher, list(method.parameters()))


def test_the_first_variance():
    method = VID(FeatureShape(2), FeatureShape(3), initial_variance=5.0, eps=1e-5)
    assert log(1 + exp(method.alpha[0].item())) + 1e-5 == pytest.approx(5.0)
    with pytest.raises(ValueError, match="initial_variance must be above eps"):
        VID(FeatureShape(2), FeatureShape(3), initial_variance=0.0)
    with pytest.raises(ValueError, match="pool the map"):
        VID(FeatureShape(3, (4, 4)), FeatureShape(3))
