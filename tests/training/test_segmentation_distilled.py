"""Distilling segmenters: what is compared on class maps, by hand, and models that differ in strides and classes."""

import math

import pytest
import torch
from tiny_segmenters import fine, large, seven_classes, small

from diffkd import KD, DiffKD, Distiller, FitNet


def distilled(student, teacher, **options):
    torch.manual_seed(3)
    images = torch.randn(3, 3, 32, 32)
    distiller = Distiller(student(4, 3), teacher, example=images[:2], **options)
    torch.manual_seed(4)
    seen = distiller.observe(images)
    torch.manual_seed(4)
    return distiller, seen, distiller(images)[1]


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_diffkd_compares_class_maps_by_dist_over_all_positions():
    """Sec. 4.3 of the paper; DIST (Huang et al., NeurIPS 2022), Eq. 8 to 10, temperature 1."""
    distiller, seen, losses = distilled(small, large(4, 3))
    assert distiller.names == ("scorer",)
    assert set(losses) == {"scorer/kd", "scorer/diffusion"}
    result = seen["scorer"].result
    ours, theirs = (
        x.detach().double().softmax(1).movedim(1, 3).reshape(-1, 4) for x in (result.denoised, result.target)
    )
    assert ours.shape == (3 * 8 * 8, 4)
    within_positions = [1 - correlation(a, b) for a, b in zip(ours, theirs, strict=True)]
    within_classes = [1 - correlation(a, b) for a, b in zip(ours.T, theirs.T, strict=True)]
    expected = sum(within_positions) / len(within_positions) + sum(within_classes) / 4
    assert float(losses["scorer/kd"].detach()) == pytest.approx(expected, rel=1e-4)


def test_kd_compares_class_maps_pixel_by_pixel():
    _, seen, losses = distilled(small, large(4, 3), method=KD)
    ours, theirs = (x.detach().double() / 4 for x in (seen["scorer"].student, seen["scorer"].teacher))
    p, q = theirs.softmax(1), ours.softmax(1)
    expected = 16 * (p * (p.log() - q.log())).sum(1).mean()
    assert float(losses["scorer/kd"].detach()) == pytest.approx(float(expected), rel=1e-4)


def test_strides_of_student_and_teacher_may_differ():
    distiller, seen, losses = distilled(small, fine(4, 3))
    assert distiller.names == ("scorer",)
    assert seen["scorer"].student.shape == seen["scorer"].teacher.shape == (3, 4, 16, 16)
    sum(losses.values()).backward()
    assert float(distiller.student.scorer.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("method", [DiffKD, FitNet])
def test_a_teacher_of_other_classes_teaches_features(method):
    distiller, seen, losses = distilled(small, seven_classes(3), method=method)
    assert distiller.names == ("body",)
    assert seen["body"].teacher.shape == (3, 12, 8, 8)
    assert all(math.isfinite(loss.detach()) for loss in losses.values())
    with pytest.raises(ValueError, match="nothing to pair for KD"):
        Distiller(small(4, 3), seven_classes(3), example=torch.randn(2, 3, 32, 32), method=KD)
