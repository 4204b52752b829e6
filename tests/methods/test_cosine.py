import torch
from torch.nn import functional as F

from diffkd import Cosine, FeatureShape


def test_the_angle_at_every_position():
    method = Cosine(FeatureShape(5, (4, 3)), FeatureShape(7, (4, 3)), weight=2.0).double()
    student, teacher = (torch.randn(2, channels, 4, 3, dtype=torch.float64) for channels in (5, 7))
    projected = F.conv2d(student, *method.student_projection.parameters())
    cosines = [
        projected[image, :, row, column].dot(teacher[image, :, row, column])
        / (projected[image, :, row, column].norm() * teacher[image, :, row, column].norm())
        for image in range(2)
        for row in range(4)
        for column in range(3)
    ]
    torch.testing.assert_close(method(student, teacher)["kd"], 2 * (1 - torch.stack(cosines).mean()))


def test_the_teachers_scale_does_not_matter():
    method = Cosine(FeatureShape(5), FeatureShape(7)).double()
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(method(student, teacher), method(student, 100 * teacher))
