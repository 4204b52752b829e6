import pytest
import torch
from torch.nn import functional as F

from diffkd import FeatureShape, FitNet


def test_projects_and_compares_maps():
    method = FitNet(FeatureShape(5, (4, 4)), FeatureShape(7, (4, 4)), weight=2.0).double()
    student, teacher = (torch.randn(2, channels, 4, 4, dtype=torch.float64) for channels in (5, 7))
    projected = F.conv2d(student, *method.student_projection.parameters())
    torch.testing.assert_close(method(student, teacher), {"kd": 2 * F.mse_loss(projected, teacher)})
    assert FitNet.wants == {"feature", "embedding"}


def test_projects_and_compares_vectors():
    method = FitNet(FeatureShape(5), FeatureShape(7)).double()
    student, teacher = (torch.randn(2, channels, dtype=torch.float64) for channels in (5, 7))
    projected = F.linear(student, *method.student_projection.parameters())
    torch.testing.assert_close(method(student, teacher)["kd"], F.mse_loss(projected, teacher))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_takes_models_of_other_types(dtype):
    method = FitNet(5, 7)
    student = torch.randn(2, 5, 4, 4, dtype=dtype, requires_grad=True)
    loss = method(student, torch.randn(2, 7, 4, 4, dtype=dtype))["kd"]
    loss.backward()
    assert student.grad.isfinite().all()


def test_the_projection_learns():
    method = FitNet(5, 7)
    method(torch.randn(2, 5, 4, 4), torch.randn(2, 7, 4, 4))["kd"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in method.parameters())
