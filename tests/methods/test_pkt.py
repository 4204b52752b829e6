import pytest
import torch

from diffkd import FeatureShape
from diffkd.methods.pkt import PKT


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((3, 2, 3, 5), (3, 6, 3, 5)), ((2, 7), (2, 3))])
def test_formula(agree, shapes):
    student, teacher = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    method = PKT(FeatureShape(student.shape[1]), FeatureShape(teacher.shape[1]))

    def probabilities(x):
        x = [row.reshape(len(row), -1).mean(1) for row in x]
        rows = []
        for a in x:
            kernel = [(a @ b / (a.norm() * b.norm()) + 1) / 2 for b in x]
            rows.append([k / sum(kernel) for k in kernel])
        return rows

    def reference(s, t):
        p, q = probabilities(t), probabilities(s)
        n = len(s)
        terms = [p[i][j] * torch.log((p[i][j] + 1e-7) / (q[i][j] + 1e-7)) for i in range(n) for j in range(n)]
        return 30000 * sum(terms) / n**2

    agree(lambda s, t: method(s, t)["kd"], reference, student, teacher)


def test_scale_rotation_and_order_do_not_matter():
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    method = PKT(FeatureShape(4), FeatureShape(4))
    expected = method(student, teacher)["kd"]
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    scale = torch.rand(6, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(method(scale * student @ rotation, 100 * teacher)["kd"], expected)
    order = torch.randperm(6)
    torch.testing.assert_close(method(student[order], teacher[order])["kd"], expected)


def test_opposite_embeddings_stay_finite():
    student = torch.randn(1, 50).repeat(8, 1) * torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    assert PKT(FeatureShape(50), FeatureShape(50))(student, torch.randn(8, 50))["kd"].isfinite()
