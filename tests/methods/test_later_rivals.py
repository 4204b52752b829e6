"""WTTM, NORM, PKD, OFA-KD and FM-KT beyond their formulas, which the tests of the presets hold."""

import pytest
import torch

from diffkd import FMKT, NORM, OFAKD, PKD, WTTM, FeatureShape
from diffkd.methods.ofakd import ofa_loss

MAP, SCORES = FeatureShape(4, (5, 5)), FeatureShape(6, (), "logits")


def test_wttm_is_ttm_times_the_smoothness():
    torch.manual_seed(0)
    s, t = torch.randn(2, 1, 6, dtype=torch.float64)
    u = (t.softmax(1) ** 0.3).sum()
    weighted, plain = WTTM(gamma=0.3)(s, t)["kd"], WTTM(gamma=0.3, weighted=False)(s, t)["kd"]
    torch.testing.assert_close(weighted, u * plain)
    # The temperature 1 is KD's divergence.
    p = t.softmax(1)
    expected = 4 * (p * (p.log() - s.log_softmax(1))).sum()
    torch.testing.assert_close(WTTM(gamma=1.0, weighted=False)(s, t)["kd"], expected)


def test_norm_is_0_where_every_segment_is_the_teacher():
    method = NORM(MAP, MAP, segments=3)
    with torch.no_grad():
        method.expansion.weight.copy_(torch.eye(4).repeat(3, 1)[:, :, None, None])
    x = torch.randn(2, 4, 5, 5)
    assert method(x, x)["kd"] == 0


def test_pkd_does_not_see_scale_and_shift_of_a_channel():
    torch.manual_seed(0)
    method = PKD(MAP, MAP, eps=0.0)
    s, t = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    factor, shift = torch.tensor([1.0, 20.0, 0.1, 3.0]), torch.tensor([0.0, -5.0, 100.0, 1.0])
    moved = t * factor[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(method(s, moved)["kd"], method(s, t)["kd"])
    assert method(t, moved)["kd"].item() == pytest.approx(0, abs=1e-12)


def test_a_gamma_above_1_enhances_the_labelled_class():
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 6, dtype=torch.float64)
    labels = torch.tensor([0, 5, 2])
    p = t.softmax(1)
    cross_entropy = -(p * s.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ofa_loss(s, t, labels, 1.0), cross_entropy)
    hard = torch.nn.functional.one_hot(labels, 6)
    enhanced = (p + hard) ** 1.5 - hard
    torch.testing.assert_close(ofa_loss(s, t, labels, 1.5), -(enhanced * s.log_softmax(1)).sum(1).mean())


def test_the_mean_of_the_flow_gets_no_gradient_from_the_students_scores():
    torch.manual_seed(0)
    method = FMKT([MAP, SCORES], [SCORES], flow_weight=0.0)
    feature = torch.randn(3, 4, 5, 5, requires_grad=True)
    own = torch.randn(3, 6, requires_grad=True)
    losses = method([feature, own], [torch.randn(3, 6)], labels=torch.tensor([0, 1, 2]))
    losses["kd"].backward()
    assert own.grad.abs().sum() > 0
    assert feature.grad is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WTTM(gamma=0.0), "gamma must be above 0, got 0"),
        (lambda: WTTM(3, 4), "3 classes, the teacher's 4"),
        (lambda: NORM(MAP, MAP, segments=0), "segments must be 1 or more"),
        (lambda: NORM(SCORES, SCORES), "needs maps"),
        (lambda: PKD(SCORES, MAP), "needs maps"),
        (lambda: OFAKD([SCORES], [SCORES]), "got 1 and 1 layers"),
        (lambda: OFAKD([MAP, SCORES], [SCORES], temperature=0.0), "temperature must be above 0"),
        (lambda: FMKT([MAP, SCORES], [SCORES], steps=0), "steps must be 1 or more"),
        (lambda: FMKT([SCORES, SCORES], [SCORES]), "needs maps"),
        (lambda: FMKT([MAP], [SCORES]), "got 1 and 1 layers"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
