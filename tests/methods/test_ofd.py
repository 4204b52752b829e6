import copy

import pytest
import torch
from torch import nn

from diffkd import FeatureShape
from diffkd.methods.ofd import OFD, Margin, margin_of, partial_distance

OURS = [FeatureShape(3, (6, 5)), FeatureShape(4, (3, 2))]
THEIRS = [FeatureShape(5, (6, 5)), FeatureShape(6, (3, 2))]


def maps(shapes, batch=3):
    return [torch.randn(batch, shape.channels, *shape.size, dtype=torch.float64) for shape in shapes]


def test_formula(agree):
    margins = [-torch.rand(5, dtype=torch.float64), -torch.rand(6, dtype=torch.float64)]
    method = OFD(OURS, THEIRS, margins=margins).double()
    shallow, deep = maps(OURS)
    theirs = maps(THEIRS)

    def level(x, connector, t, m):
        z = torch.einsum("oc,bchw->bohw", connector[0].weight[:, :, 0, 0], x)
        mean = z.mean(dim=(0, 2, 3), keepdim=True)
        z = (z - mean) / (((z - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True) + 1e-5).sqrt()
        total = 0.0
        for c in range(t.shape[1]):
            for student, teacher in zip(z[:, c].flatten(), t[:, c].flatten(), strict=True):
                target = max(teacher, m[c])
                if not (student <= target <= 0):
                    total = total + (target - student) ** 2
        return total / len(x)

    def reference(s, _):
        terms = [level(x, c, t, m) for x, c, t, m in zip((shallow, s), method.connectors, theirs, margins, strict=True)]
        return 1e-3 * (terms[0] / 2 + terms[1])

    weights = [connector[0].weight for connector in method.connectors]
    agree(lambda s, _: method([shallow, s], theirs)["kd"], reference, deep, theirs[-1], weights)


def test_partial_distance_leaves_out_what_the_relu_switches_off():
    student = torch.tensor([[-3.0, -1.0, 0.5, -2.0]])
    teacher = torch.tensor([[-2.0, -2.0, -1.0, 1.0]])
    assert partial_distance(student, teacher).item() == 0 + 1 + 2.25 + 9


def test_margins_are_estimated_from_the_training_batches():
    margin = Margin(2, momentum=0.5).double()
    x = torch.tensor([[1.0, -1.0, -3.0, 2.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).reshape(1, 2, 2, 2)
    cut = margin(x)
    assert cut.flatten().tolist() == [1, -1, -2, 2, 1, 2, 3, 4]  # the mean of -1 and -3; nothing negative
    margin.eval()
    assert torch.equal(margin(10 * x)[0, 0].flatten(), torch.tensor([10.0, -2, -2, 20]).double())
    margin.train()
    second = margin(torch.full_like(x, -8.0))
    # Half of (-1, 1/2), which are 1/2 of the first batch's, and half of (-8, 1).
    assert second[0, 0, 0, 0].item() == pytest.approx((0.25 * -1 + 0.5 * -8) / (0.25 * 0.5 + 0.5))


def test_margins_are_in_the_state_dict():
    method = OFD(OURS, THEIRS).double()
    ours, theirs = maps(OURS), maps(THEIRS)
    method(ours, theirs)
    other = OFD(OURS, THEIRS).double()
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert other(ours, theirs)["kd"] == method(ours, theirs)["kd"]


def test_margin_of_a_batch_normalisation():
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.bias.copy_(torch.tensor([0.3, -1.0, 5.0]))
    drawn = torch.tensor([1.0, 2.0]) * torch.randn(1_000_000, 2, dtype=torch.float64) + torch.tensor([0.3, -1.0])
    expected = [drawn[:, c][drawn[:, c] < 0].mean().item() for c in range(2)]
    assert margin_of(norm).tolist() == pytest.approx([*expected, -1.5], abs=0.01)
    with pytest.raises(ValueError, match="no scale and shift"):
        margin_of(nn.BatchNorm2d(3, affine=False))


def test_a_larger_teacher_map_is_averaged():
    method = OFD([FeatureShape(2, (2, 2))], [FeatureShape(2, (4, 4))]).double().eval()
    student, teacher = torch.zeros(1, 2, 2, 2, dtype=torch.float64), torch.rand(1, 2, 4, 4, dtype=torch.float64)
    expected = teacher.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5)).square().sum()
    torch.testing.assert_close(method([student], [teacher])["kd"], 1e-3 * expected)


def test_errors():
    with pytest.raises(ValueError, match="as many levels"):
        OFD(OURS, THEIRS[:1])
    with pytest.raises(ValueError, match="2 levels, but got 1 margins"):
        OFD(OURS, THEIRS, margins=[torch.zeros(5)])
    with pytest.raises(ValueError, match="does not fit 6 channels"):
        OFD(OURS, THEIRS, margins=[torch.zeros(5), torch.zeros(5)])


def test_a_batch_that_is_not_finite_leaves_the_margins():
    margin = Margin(2).double()
    margin(torch.randn(3, 2, 4, 4).double())
    before = margin.negative.clone()
    margin(torch.full((3, 2, 4, 4), -torch.inf).double())
    assert torch.equal(margin.negative, before)
