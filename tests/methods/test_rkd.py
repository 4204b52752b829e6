import pytest
import torch

from diffkd import FeatureShape
from diffkd.methods.rkd import RKD


def huber(x):
    return 0.5 * x**2 if abs(x.item()) < 1 else abs(x) - 0.5


def reference(s, t, distance_weight, angle_weight):
    s, t = (x.flatten(2).mean(2) if x.ndim == 4 else x for x in (s, t))
    n = len(s)

    def distance(x, i, j):
        return ((x[i] - x[j]) ** 2).sum().sqrt()

    def cosine(x, i, j, k):
        return ((x[i] - x[j]) / distance(x, i, j)) @ ((x[k] - x[j]) / distance(x, k, j))

    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    mu_s, mu_t = (sum(distance(x, i, j) for i, j in pairs) / len(pairs) for x in (s, t))
    distances = sum(huber(distance(s, i, j) / mu_s - distance(t, i, j) / mu_t) for i, j in pairs) / n**2
    triples = [(i, j, k) for i, j in pairs for k in range(n) if k != j]
    angles = sum(huber(cosine(s, i, j, k) - cosine(t, i, j, k)) for i, j, k in triples) / n**3
    return distance_weight * distances + angle_weight * angles


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((4, 2, 3, 5), (4, 6, 3, 5)), ((2, 7), (2, 3))])
@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0)])
def test_formula(agree, shapes, weights):
    student, teacher = (
        torch.randn(shape, dtype=torch.float64) * scale for shape, scale in zip(shapes, (1, 9), strict=True)
    )
    method = RKD(
        FeatureShape(student.shape[1]),
        FeatureShape(teacher.shape[1]),
        distance_weight=weights[0],
        angle_weight=weights[1],
    )
    if len(student) == 2:  # two images have one distance, which is its own mean, and only angles of 0
        assert method(student, teacher)["kd"].item() == pytest.approx(0, abs=1e-10)
    else:
        agree(lambda s, t: method(s, t)["kd"], lambda s, t: reference(s, t, *weights), student, teacher)


def test_rotation_shift_scale_and_order_do_not_matter():
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    method = RKD(FeatureShape(4), FeatureShape(4))
    expected = method(student, teacher)["kd"]
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    moved = 3.5 * student @ rotation + torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(method(moved, 0.01 * teacher - 2)["kd"], expected)
    order = torch.randperm(6)
    torch.testing.assert_close(method(student[order], teacher[order])["kd"], expected)
    assert method(moved, student)["kd"] < 1e-20


def test_equal_embeddings_have_finite_gradients():
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    RKD(FeatureShape(2), FeatureShape(2))(student, torch.randn(3, 2))["kd"].backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e3
