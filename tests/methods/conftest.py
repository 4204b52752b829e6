from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def agree():
    """Check that two losses of (student, teacher) are equal, and so are their gradients, to 1e-10."""

    def check(ours: Loss, reference: Loss, student: Tensor, teacher: Tensor, parameters: Iterable[Tensor] = ()) -> None:
        assert student.dtype == torch.float64
        leaves = [student.detach().requires_grad_(), *parameters]
        results = []
        for loss in (ours, reference):
            value = loss(leaves[0], teacher)
            assert value.shape == ()
            results.append((value, *torch.autograd.grad(value, leaves)))
        for mine, its in zip(*results, strict=True):
            scale = max(1.0, its.abs().max().item())
            assert (mine - its).abs().max().item() <= 1e-10 * scale
        assert results[0][1].abs().max() > 0

    return check
