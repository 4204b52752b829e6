import pytest
import torch

from diffkd import BoxKD, FeatureShape


def shapes(*channels):
    return [FeatureShape(count) for count in channels]


def draw(rows, *channels):
    return [torch.randn(rows, count, dtype=torch.float64) for count in channels]


@pytest.mark.parametrize("foreground", [True, False])
def test_one_stage_by_hand(foreground):
    student, teacher = draw(5, 3, 4), draw(5, 3, 4)
    losses = BoxKD(shapes(3, 4), shapes(3, 4), regression_weight=2, class_weight=0.5, foreground=foreground)(
        student, teacher
    )
    top, total, numerator, entropy = teacher[0].sigmoid().max(1).values, 0.0, 0.0, 0.0
    for row in range(5):
        weight = float(top[row]) if foreground else 1.0
        total += weight
        numerator += weight * float(((student[1][row] - teacher[1][row]) ** 2).sum() / 4)
        for t, s in zip(teacher[0][row].sigmoid().tolist(), student[0][row].sigmoid().tolist(), strict=True):
            two = torch.tensor([[t, 1 - t], [s, 1 - s]], dtype=torch.float64)
            entropy += weight * float((two[0] * (two[0] / two[1]).log()).sum())
    assert float(losses["kd"]) == pytest.approx(2 * numerator / total, rel=1e-10)
    assert float(losses["classes"]) == pytest.approx(0.5 * entropy / total, rel=1e-10)


def test_two_stage_by_hand_leaves_the_background_out():
    student, teacher = draw(6, 4, 16), draw(6, 4, 16)
    loss = BoxKD(shapes(4, 16), shapes(4, 16))(student, teacher)
    assert list(loss) == ["kd"]
    probabilities, total, numerator = teacher[0].softmax(1), 0.0, 0.0
    for row in range(6):
        for label in (1, 2, 3):
            weight = float(probabilities[row, label])
            deltas = slice(4 * label, 4 * label + 4)
            total += weight
            numerator += weight * float((student[1][row, deltas] - teacher[1][row, deltas]).square().mean())
    assert float(loss["kd"]) == pytest.approx(numerator / total, rel=1e-10)
    moved = [student[0], student[1].clone()]
    moved[1][:, :4] += 100
    torch.testing.assert_close(BoxKD(shapes(4, 16), shapes(4, 16))(moved, teacher), loss)


def test_agreement_and_no_boxes_cost_nothing():
    one = draw(4, 2, 8)
    method = BoxKD(shapes(2, 8), shapes(2, 8), class_weight=1.0)
    for student, teacher in ((one, one), (draw(0, 2, 8), draw(0, 2, 8))):
        assert all(float(loss) == pytest.approx(0, abs=1e-12) for loss in method(student, teacher).values())


def test_gradients_reach_the_student_alone():
    student, teacher = draw(4, 3, 4), draw(4, 3, 4)
    for tensor in (*student, *teacher):
        tensor.requires_grad_()
    sum(BoxKD(shapes(3, 4), shapes(3, 4), class_weight=1.0)(student, teacher).values()).backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in student)
    assert all(tensor.grad is None for tensor in teacher)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[5, 4\]"):
        BoxKD(shapes(3, 4), shapes(5, 4))
    with pytest.raises(ValueError, match="at least 0"):
        BoxKD(shapes(3, 4), shapes(3, 4), class_weight=-1)
    with pytest.raises(ValueError, match="3 boxes, the teacher 4"):
        BoxKD(shapes(3, 4), shapes(3, 4))(draw(3, 3, 4), draw(4, 3, 4))
