import pytest
import torch

from diffkd import FeatureShape
from diffkd.methods.mgd import MGD


def convolve(x, layer):
    """A 3x3 convolution, one tap after the other."""
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 2, x.shape[3] + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    result = layer.bias[:, None, None]
    for dy in range(3):
        for dx in range(3):
            part = padded[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
            result = result + torch.einsum("oc,bchw->bohw", layer.weight[:, :, dy, dx], part)
    return result


@pytest.mark.parametrize(("size", "channels"), [((3, 5), (4, 4)), ((2, 2), (3, 5)), ((1, 1), (2, 3))])
@pytest.mark.parametrize("drop", ["positions", "channels"])
def test_formula(agree, size, channels, drop):
    method = MGD(*(FeatureShape(c, size) for c in channels), drop=drop, weight=0.5).double()
    student = torch.randn(2, channels[0], *size, dtype=torch.float64)
    teacher = torch.randn(2, channels[1], *size, dtype=torch.float64)
    keep = torch.rand(2, 1, *size) > 0.5 if drop == "positions" else torch.rand(2, channels[1], 1, 1) > 0.5
    keep[0] = True

    def reference(s, t):
        if channels[0] != channels[1]:
            w, b = method.student_projection.weight[:, :, 0, 0], method.student_projection.bias
            s = torch.einsum("oc,bchw->bohw", w, s) + b[:, None, None]
        generated = convolve(convolve(s * keep, method.generation[0]).clamp(min=0), method.generation[2])
        return 0.5 * sum(((generated[b] - t[b]) ** 2).sum() for b in range(2)) / 2

    agree(lambda s, t: method(s, t, keep=keep)["kd"], reference, student, teacher, list(method.parameters()))


@pytest.mark.parametrize("drop", ["positions", "channels"])
def test_the_dropped_share(drop):
    size = (40, 50)
    method = MGD(*(FeatureShape(32, size),) * 2, ratio=0.3, drop=drop)
    method.generation = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 1))
    seen = []
    method.generation.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method(torch.ones(8, 32, *size), torch.ones(8, 32, *size))
    zeros = seen[0] == 0
    axes = (1,) if drop == "positions" else (2, 3)
    assert torch.equal(zeros.all(dim=axes), zeros.any(dim=axes))  # as a whole
    assert zeros.float().mean().item() == pytest.approx(0.3, abs=0.02 if drop == "positions" else 0.09)


def test_errors():
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), got 1"):
        MGD(*(FeatureShape(3, (4, 4)),) * 2, ratio=1)
    with pytest.raises(ValueError, match="drop must be"):
        MGD(*(FeatureShape(3, (4, 4)),) * 2, drop="rows")
