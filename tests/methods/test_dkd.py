import pytest
import torch
import torch.nn.functional as F

from diffkd import KD, FeatureShape
from diffkd.methods.dkd import DKD, decoupled
from diffkd.methods.kd import standardize


def shapes(classes, size=()):
    return (FeatureShape(classes, size, "logits"),) * 2


def reference(student, teacher, labels, alpha, beta, tau):
    """One sample after the other, from probabilities."""
    total = 0.0
    for ours, theirs, label in zip(student, teacher, labels.tolist(), strict=True):
        p, q = (theirs / tau).softmax(0), (ours / tau).softmax(0)
        rest = [k for k in range(len(p)) if k != label]
        binary = p[label] * (p[label] / q[label]).log() + (1 - p[label]) * ((1 - p[label]) / (1 - q[label])).log()
        p_rest, q_rest = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        total = total + alpha * binary + beta * (p_rest * (p_rest / q_rest).log()).sum()
    return tau**2 * total / len(student)


@pytest.mark.parametrize(("batch", "classes"), [(5, 7), (1, 3), (3, 2)])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "beta": 2.0, "temperature": 1.0}])
def test_formula(agree, batch, classes, options):
    student, teacher = torch.randn(2, batch, classes, dtype=torch.float64)
    student = student * 2
    labels = torch.randint(classes, (batch,))
    method = DKD(*shapes(classes), **options)
    alpha, beta, tau = method.alpha, method.beta, method.temperature
    agree(
        lambda s, t: method(s, t, labels=labels)["kd"],
        lambda s, t: reference(s, t, labels, alpha, beta, tau),
        student,
        teacher,
    )


def test_the_parts_recombine_to_kd():
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64)
    labels = torch.randint(9, (6,))
    target, others = decoupled(student, teacher, labels, 4.0)
    p = (teacher / 4).softmax(1)
    divergence = F.kl_div((student / 4).log_softmax(1), p, reduction="none").sum(1)
    share = 1 - p[torch.arange(6), labels]
    torch.testing.assert_close(target + share * others, divergence, rtol=0, atol=1e-12)


def test_maps_are_many_samples_and_unknown_labels_are_left_out():
    student, teacher = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64)
    labels = torch.randint(4, (2, 3, 5))
    labels[0, 1, 2], labels[1, 0, 0] = 255, -1
    method = DKD(*shapes(4, (3, 5)))
    expected = 0.0
    for b in range(2):
        for y in range(3):
            for x in range(5):
                if 0 <= labels[b, y, x] < 4:
                    where = (slice(b, b + 1), slice(None), y, x)
                    expected += reference(student[where], teacher[where], labels[b, y, x][None], 1, 8, 4.0)
    assert method(student, teacher, labels=labels)["kd"].item() == pytest.approx(expected.item() / 30, abs=1e-10)


def test_on_maps_it_counts_as_much_as_kd():
    """With alpha = 1 and beta = 1 - p_t it is KD, whatever the resolution."""
    student, teacher = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64)
    teacher = teacher[:, :, :1, :1].expand(-1, -1, 3, 5)
    labels = torch.full((2, 3, 5), 2)
    expected = KD(temperature=4.0)(student, teacher)["kd"]
    total = 0.0
    for image in range(2):
        beta = 1 - (teacher[image, :, 0, 0] / 4).softmax(0)[2].item()
        part = slice(image, image + 1)
        method = DKD(*shapes(4, (3, 5)), beta=beta)
        total += method(student[part], teacher[part], labels=labels[part])["kd"] / 2
    torch.testing.assert_close(total, expected)


def test_standardized_logits():
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    labels = torch.randint(6, (4,))
    plain, standard = DKD(*shapes(6)), DKD(*shapes(6), standardize=True)
    expected = plain(standardize(student), standardize(teacher), labels=labels)["kd"]
    torch.testing.assert_close(standard(student, teacher, labels=labels)["kd"], expected)
    torch.testing.assert_close(standard(5 * student + 2, teacher, labels=labels)["kd"], expected)


def test_labels_of_another_resolution_are_taken_at_the_nearest_position():
    student, teacher = torch.randn(2, 2, 4, 3, 3)
    labels = torch.randint(-1, 4, (2, 3, 3))
    larger = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    method = DKD(*shapes(4))
    assert torch.equal(method(student, teacher, labels=larger)["kd"], method(student, teacher, labels=labels)["kd"])


def test_sure_logits_stay_finite():
    student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    loss = DKD(*shapes(3))(student, -student.detach(), labels=torch.tensor([0]))["kd"]
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match="classes"):
        DKD(FeatureShape(10), FeatureShape(20))
    with pytest.raises(ValueError, match="DKD compares softmax distributions and needs 2 or more classes"):
        DKD(*shapes(1))
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        DKD(*shapes(3), temperature=0)
    with pytest.raises(ValueError, match="needs the class of every pixel, whole numbers of shape"):
        DKD(*shapes(3))(*torch.zeros(2, 2, 3, 4, 4), labels=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="mixed labels"):
        DKD(*shapes(3))(torch.zeros(2, 3), torch.zeros(2, 3), labels=torch.zeros(2, 3))
