import pytest
import torch

from diffkd import FeatureShape
from diffkd.methods.sp import SP


@pytest.mark.parametrize("shapes", [((4, 3), (4, 5)), ((3, 2, 3, 5), (3, 4, 2, 2)), ((5, 2, 1, 3), (5, 6))])
def test_formula(agree, shapes):
    student, teacher = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    method = SP(FeatureShape(student.shape[1]), FeatureShape(teacher.shape[1]))

    def reference(s, t):
        count = len(s)
        rows = []
        for x in (s, t):
            products = torch.stack([torch.stack([(x[i] * x[j]).sum() for j in range(count)]) for i in range(count)])
            rows.append([row / (row**2).sum().sqrt() for row in products])
        return 3000 / count**2 * sum(((a - b) ** 2).sum() for a, b in zip(*rows, strict=True))

    agree(lambda s, t: method(s, t)["kd"], reference, student, teacher)


def test_orthogonal_maps_and_the_order_of_images_do_not_matter():
    student, teacher = torch.randn(2, 6, 8, dtype=torch.float64)
    method = SP(FeatureShape(8), FeatureShape(8))
    expected = method(student, teacher)["kd"]
    orthogonal = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    torch.testing.assert_close(method(student @ orthogonal, teacher[:, torch.randperm(8)])["kd"], expected)
    order = torch.randperm(6)
    torch.testing.assert_close(method(student[order], teacher[order])["kd"], expected)
    assert method(student, teacher[order])["kd"] != expected
