import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffkd import FeatureShape, Hint


@pytest.mark.parametrize(
    ("ours", "theirs", "kind", "kernel"),
    [
        ((8, 8), (8, 8), nn.Conv2d, (1, 1)),
        ((8, 8), (4, 4), nn.Conv2d, (3, 3)),
        ((4, 4), (8, 8), nn.ConvTranspose2d, (4, 4)),  # ResNet-50 to MobileNetV2, ResNet-32x4 to the ShuffleNets
        ((7, 9), (5, 8), nn.Conv2d, (3, 2)),
    ],
)
def test_the_convolution_brings_the_map_to_the_teachers_size(ours, theirs, kind, kernel):
    torch.manual_seed(0)
    method = Hint(FeatureShape(3, ours), FeatureShape(5, theirs)).double()
    convolution, norm, _ = method.regression
    assert (type(convolution), convolution.kernel_size) == (kind, kernel)
    student = torch.randn(2, 3, *ours, dtype=torch.float64)
    teacher = torch.randn(2, 5, *theirs, dtype=torch.float64)
    z = convolution(student)
    assert z.shape == teacher.shape
    z = F.batch_norm(z, None, None, norm.weight, norm.bias, training=True).relu()
    torch.testing.assert_close(method(student, teacher)["kd"], 100 * ((z - teacher) ** 2).mean(), rtol=1e-10, atol=0)


def test_errors():
    with pytest.raises(ValueError, match="no convolution from a map of 3x3 to one of 8x8"):
        Hint(FeatureShape(3, (3, 3)), FeatureShape(3, (8, 8)))
    with pytest.raises(ValueError, match="needs maps"):
        Hint(FeatureShape(3), FeatureShape(3))
