import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffkd.diffusion.distances import attention_mse, dist, kl_by_position, kl_divergence, mse, pearson

SHAPES = [(4, 7), (3, 5, 2, 3), (1, 4), (2, 3, 1, 1)]


def plain_kl(student, teacher, tau):
    p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)
    return (p * (p.log() - q.log())).sum() / len(student) * tau**2


def plain_dist(student, teacher, beta, gamma, tau):
    """Numpy's correlation, one pair of rows after the other."""
    a, b = (student / tau).softmax(1), (teacher / tau).softmax(1)

    def correlation(x, y):
        return torch.corrcoef(torch.stack([x, y]))[0, 1]

    positions = a.flatten(2).unbind(2) if a.ndim == 4 else [a]
    others = b.flatten(2).unbind(2) if b.ndim == 4 else [b]
    inter = [1 - correlation(x[i], y[i]) for x, y in zip(positions, others, strict=True) for i in range(len(x))]
    intra = [
        1 - correlation(x[:, k], y[:, k]) for x, y in zip(positions, others, strict=True) for k in range(x.shape[1])
    ]
    return tau**2 * (beta * torch.stack(inter).mean() + gamma * torch.stack(intra).mean())


def pair(shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_the_formula(shape, tau):
    student, teacher = pair(shape)
    loss, expected = kl_divergence(student, teacher, tau), plain_kl(student, teacher, tau)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_kl_of_two_classes_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    # teacher (3/4, 1/4), student (1/2, 1/2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(kl_divergence(student, teacher)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("beta", "gamma", "tau"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0)])
@pytest.mark.parametrize("shape", [(4, 7), (3, 5, 2, 3)])
def test_dist_is_the_formula(shape, beta, gamma, tau):
    student, teacher = pair(shape)
    loss, expected = dist(student, teacher, beta, gamma, tau), plain_dist(student, teacher, beta, gamma, tau)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)  # ours keeps an epsilon in the denominator


def test_dist_can_pool_positions():
    student, teacher = pair((3, 5, 2, 3))
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
    torch.testing.assert_close(dist(student, teacher, pool_positions=True), dist(*flat))
    assert not torch.allclose(dist(student, teacher), dist(*flat))


@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_correlation_ignores_scale_and_shift(scale, shift):
    a, b = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(pearson(scale * a + shift, b), pearson(a, b), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pearson(a, scale * a + shift), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_correlation_of_a_constant_is_zero_with_a_finite_gradient():
    a = torch.ones(2, 5, requires_grad=True)
    correlation = pearson(a, torch.randn(2, 5))
    correlation.sum().backward()
    assert (correlation == 0).all()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("distance", [mse, kl_divergence, dist])
@pytest.mark.parametrize("shape", [(4, 7), (3, 5, 2, 3)])
class TestEveryDistance:
    def test_is_zero_between_equals(self, distance, shape):
        x = torch.randn(shape, dtype=torch.float64)
        # The epsilon in DIST's denominators weighs where a class hardly varies.
        assert float(distance(x, x.clone())) == pytest.approx(0, abs=1e-3)

    def test_is_positive_between_others(self, distance, shape):
        assert float(distance(torch.randn(shape), torch.randn(shape))) > 0.01

    def test_does_not_mind_the_order_of_the_batch(self, distance, shape):
        student, teacher = torch.randn(2, *shape, dtype=torch.float64)
        order = torch.randperm(shape[0])
        torch.testing.assert_close(distance(student[order], teacher[order]), distance(student, teacher))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_computes_in_float32_on_half_precision(self, distance, shape, dtype):
        student, teacher = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        loss = distance(student, teacher)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, distance(student.float(), teacher.float()))

    def test_survives_large_logits(self, distance, shape):
        student = (1e4 * torch.randn(shape)).requires_grad_()
        loss = distance(student, 1e4 * torch.randn(shape))
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()

    def test_takes_a_wider_teacher(self, distance, shape):
        student = torch.randn(shape, requires_grad=True)
        distance(student, torch.randn(shape, dtype=torch.float64)).backward()
        assert student.grad.dtype == torch.float32


def test_the_teacher_learns_nothing_from_kl():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    kl_divergence(student, teacher).backward()
    assert teacher.grad is None


def test_attention_mse_by_hand():
    student, teacher = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64)
    strength, expected = teacher.abs(), 0.0
    for b in range(2):
        space = (strength[b].mean(0).flatten() / 0.5).softmax(0) * 8
        channel = (strength[b].mean((1, 2)) / 0.5).softmax(0) * 3
        for c in range(3):
            for position in range(8):
                error = student[b, c].flatten()[position] - teacher[b, c].flatten()[position]
                expected += float(space[position] * channel[c] * error**2) / 48
    assert float(attention_mse(student, teacher)) == pytest.approx(expected, rel=1e-10)
    flat = torch.full_like(teacher, 2.0)
    torch.testing.assert_close(attention_mse(student, flat), mse(student, flat))


def test_kl_by_position_is_the_mean_over_pixels():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    pixels = [x.movedim(1, -1).flatten(0, 2) for x in (student, teacher)]  # (40, 3)
    torch.testing.assert_close(kl_by_position(student, teacher, 2.0), kl_divergence(*pixels, 2.0))
