import pytest
import torch

from diffkd import FeatureShape
from diffkd.methods.cwd import CWD


@pytest.mark.parametrize(("batch", "size", "channels"), [(2, (3, 5), (4, 4)), (1, (2, 2), (3, 5))])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_formula(agree, batch, size, channels, temperature):
    method = CWD(*(FeatureShape(c, size) for c in channels), temperature=temperature).double()
    student = torch.randn(batch, channels[0], *size, dtype=torch.float64)
    teacher = torch.randn(batch, channels[1], *size, dtype=torch.float64)

    def reference(s, t):
        if channels[0] != channels[1]:
            w, b = method.student_projection.weight[:, :, 0, 0], method.student_projection.bias
            s = torch.einsum("oc,bchw->bohw", w, s) + b[:, None, None]
        total = 0.0
        for i in range(batch):
            for c in range(channels[1]):
                p, q = (torch.exp(x[i, c] / temperature) for x in (t, s))
                p, q = p / p.sum(), q / q.sum()
                total = total + (p * torch.log(p / q)).sum()
        return 50 * temperature**2 / channels[1] * total / batch

    agree(lambda s, t: method(s, t)["kd"], reference, student, teacher, list(method.parameters()))


def test_a_shift_of_each_channel_does_not_matter():
    student, teacher = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64)
    method = CWD(FeatureShape(4, (3, 5)), FeatureShape(4, (3, 5)))
    shifts = 10 * torch.randn(2, 2, 4, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(method(student + shifts[0], teacher + shifts[1]), method(student, teacher))


def test_the_weight_follows_the_role():
    assert CWD(*(FeatureShape(4, (3, 5), "logits"),) * 2).weight == 3
    assert CWD(*(FeatureShape(4, (3, 5)),) * 2).weight == 50
    assert CWD(*(FeatureShape(4, (3, 5)),) * 2, weight=0).weight == 0
