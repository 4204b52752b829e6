import pytest
import torch

from diffkd import FeatureShape
from diffkd.methods.at import AT


@pytest.mark.parametrize(("batch", "size"), [(3, (4, 4)), (1, (3, 7)), (2, (1, 1))])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_formula(agree, batch, size, power):
    student = torch.randn(batch, 3, *size, dtype=torch.float64)
    teacher = torch.randn(batch, 5, *size, dtype=torch.float64)
    method = AT(FeatureShape(3, size), FeatureShape(5, size), power=power)

    def reference(s, t):
        total = 0.0
        for b in range(batch):
            q_s, q_t = (sum(abs(x[b, c]) ** power for c in range(x.shape[1])) for x in (s, t))
            q_s, q_t = q_s / (q_s**2).sum().sqrt(), q_t / (q_t**2).sum().sqrt()
            total = total + ((q_s - q_t) ** 2).sum() / (size[0] * size[1])
        return 1000 * total / batch

    if size == (1, 1):
        assert method(student, teacher)["kd"].item() == 0  # one position has all the attention
    else:
        agree(lambda s, t: method(s, t)["kd"], reference, student, teacher)


def test_scale_and_order_of_channels_do_not_matter():
    student = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    teacher = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    method = AT(FeatureShape(4, (3, 5)), FeatureShape(6, (3, 5)))
    expected = method(student, teacher)["kd"]
    torch.testing.assert_close(method(-7 * student[:, [2, 0, 3, 1]], 0.1 * teacher)["kd"], expected)


def test_errors():
    with pytest.raises(ValueError, match="AT compares positions"):
        AT(FeatureShape(3, (4, 4)), FeatureShape(3))
    method = AT(FeatureShape(3, (4, 4)), FeatureShape(3, (4, 4)))
    with pytest.raises(ValueError, match="same batch and spatial size"):
        method(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5))
