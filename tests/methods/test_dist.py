import pytest
import torch

from diffkd import DIST, FeatureShape
from diffkd.diffusion.distances import dist


@pytest.mark.parametrize("shape", [(4, 7), (2, 7, 3, 3)])
def test_is_the_distance(shape):
    student, teacher = torch.randn(shape), torch.randn(shape)
    for pool in (True, False):
        method = DIST(7, FeatureShape(7), beta=2.0, gamma=0.5, temperature=4.0, pool_positions=pool, weight=3.0)
        expected = dist(student, teacher, 2.0, 0.5, 4.0, pool_positions=pool)
        torch.testing.assert_close(method(student, teacher), {"kd": 3 * expected})


def test_defaults_are_those_for_imagenet():
    student, teacher = torch.randn(2, 4, 7).unbind()
    torch.testing.assert_close(DIST()(student, teacher)["kd"], dist(student, teacher, 1.0, 1.0, 1.0))
    assert DIST.wants == {"logits"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DIST(10, 7), "10 classes, the teacher's 7"),
        (lambda: DIST(temperature=-1), "above 0, got -1"),
        (lambda: DIST(1), "DIST compares softmax distributions and needs 2 or more classes, got 1"),
        (lambda: DIST()(torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)), "needs 2 or more classes, got 1"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
