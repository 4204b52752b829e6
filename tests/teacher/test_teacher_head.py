import pytest
import torch
from torch import nn

from diffkd import SRRL, Distiller
from diffkd.teacher.classifier import pooled_classifier


def net(width: int, classes: int = 5) -> nn.Sequential:
    conv = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU())
    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def test_equals_the_rest_of_the_teacher() -> None:
    teacher = net(7).double()
    images = torch.randn(3, 3, 9, 12, dtype=torch.float64)
    head = pooled_classifier(teacher, 7)
    assert torch.allclose(head(teacher[0](images)), teacher(images), rtol=1e-12, atol=1e-12)


def test_gradient_reaches_the_feature_but_not_the_teacher() -> None:
    teacher = net(7)
    feature = torch.randn(2, 7, 3, 3, requires_grad=True)
    pooled_classifier(teacher, 7)(feature).sum().backward()
    assert feature.grad is not None
    assert feature.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_distiller_hands_it_to_the_method_that_wants_it() -> None:
    images, labels = torch.randn(4, 3, 9, 9), torch.tensor([0, 1, 2, 3])
    _, losses = Distiller(net(4), net(7), example=images, method=SRRL)(images, labels=labels)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_teacher_without_a_fitting_layer_says_what_to_hand_over() -> None:
    with pytest.raises(ValueError, match="teacher_head"):
        pooled_classifier(net(7), 8)
    with pytest.raises(ValueError, match="is missing"):
        pooled_classifier(nn.Conv2d(3, 4, 1), 4)
