import pytest
import torch

from diffkd import KD, FeatureShape
from diffkd.diffusion.distances import kl_divergence


@pytest.mark.parametrize("shape", [(4, 7), (2, 7, 3, 3)])
def test_is_the_softened_divergence(shape):
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    losses = KD(temperature=2.0, weight=3.0)(student, teacher)
    expected = 3 * kl_divergence(student, teacher, 2.0)
    torch.testing.assert_close(losses, {"kd": expected / student[0, 0].numel()})
    summed = KD(temperature=2.0, weight=3.0, average_positions=False)(student, teacher)
    torch.testing.assert_close(summed, {"kd": expected})


def test_tau_is_four_and_there_is_nothing_to_train():
    method = KD(FeatureShape(7), 7)
    student, teacher = torch.randn(2, 4, 7).unbind()
    torch.testing.assert_close(method(student, teacher)["kd"], kl_divergence(student, teacher, 4.0))
    assert not list(method.parameters())
    assert KD.wants == {"logits"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KD(10, 7), "10 classes, the teacher's 7: .* distil features instead"),
        (lambda: KD(FeatureShape(10), FeatureShape(7)), "cannot be compared"),
        (lambda: KD(1, 1), r"needs 2 or more classes, got 1.* let both models score two classes"),
        (lambda: KD()(torch.randn(4, 1), torch.randn(4, 1)), "needs 2 or more classes, got 1"),
        (lambda: KD(temperature=0), "temperature must be above 0, got 0"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
