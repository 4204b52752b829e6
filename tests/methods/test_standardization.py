import pytest
import torch

from diffkd.methods.kd import standardize


@pytest.mark.parametrize("shape", [(4, 7), (1, 2), (2, 5, 3, 4)])
def test_formula(shape):
    logits = torch.randn(shape, dtype=torch.float64) * 3 + 1
    classes = shape[1]
    mean = sum(logits[:, k] for k in range(classes)) / classes
    variance = sum((logits[:, k] - mean) ** 2 for k in range(classes)) / (classes - 1)
    expected = torch.stack([(logits[:, k] - mean) / (variance.sqrt() + 1e-7) for k in range(classes)], dim=1)
    torch.testing.assert_close(standardize(logits), expected, rtol=0, atol=1e-10)


def test_shift_and_scale_do_not_matter():
    logits = torch.randn(3, 10, dtype=torch.float64)
    factor, shift = torch.tensor([[2.0], [50.0], [0.3]]), torch.tensor([[1.0], [-7.0], [4.0]])
    torch.testing.assert_close(standardize(logits * factor + shift, eps=0.0), standardize(logits, eps=0.0))


def test_equal_logits_have_finite_gradients():
    logits = torch.ones(2, 5, requires_grad=True)
    (standardize(logits) * torch.randn(2, 5)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
