import pytest
import timm
import torch
from torch import nn

from diffkd import SRRL, Distiller, MasKD, Pair, TeacherOptions
from diffkd.teacher.classifier import rest_of

IMAGES = torch.randn(3, 3, 16, 20, dtype=torch.float64)


def net(width: int, classes: int = 5) -> nn.Sequential:
    conv = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU())
    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class Between(nn.Module):
    """A classifier with something between its last map and its linear layer."""

    def __init__(self, between: nn.Module, activation: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 7, 3, stride=2), nn.Conv2d(7, 7, 3))
        self.between, self.activation, self.fc = between, activation, nn.Linear(7, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.between(self.body(images))
        x = x.relu() if self.activation else x
        return self.fc(x.flatten(2).mean(2) if x.ndim == 4 else x)


class Norm(nn.GroupNorm):
    """Of one group, with a scale and a shift that are not the identity."""

    def __init__(self) -> None:
        super().__init__(1, 7)
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias)


def head_of(teacher: nn.Module, layer: str, feature: torch.Tensor, images: torch.Tensor = IMAGES):
    return rest_of(teacher, layer, images, feature, teacher(images))


@pytest.mark.parametrize(
    "teacher",
    [
        net(7),
        Between(nn.Identity()),
        Between(nn.Sequential(Norm(), nn.ReLU(), nn.AdaptiveAvgPool2d(1))),
        Between(nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Tanh())),
    ],
)
def test_equals_the_rest_of_the_teacher(teacher) -> None:
    teacher = teacher.double().eval()
    body = next(teacher.children())
    name = next(name for name, _ in teacher.named_children())
    head = head_of(teacher, name, body(IMAGES))
    others = torch.randn_like(IMAGES)
    assert torch.allclose(head(body(others)), teacher(others), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet"])
def test_equals_the_rest_of_networks_of_timm(name) -> None:
    teacher = timm.create_model(name, num_classes=5).eval()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    images = torch.randn(2, 3, 64, 64)
    distiller = Distiller(net(8), teacher, example=images, method=SRRL)
    (pair,), ((_, reader),) = distiller.pairs, distiller.readers
    feature = reader.read(distiller.teacher_features(images))
    assert torch.allclose(distiller.teacher_head(distiller.names[0])(feature), teacher(images), rtol=1e-4, atol=1e-4)
    assert pair.teacher_names[0] in dict(teacher.named_modules())


def test_what_cannot_be_had_from_the_feature_is_refused_with_the_mend() -> None:
    teacher = Between(Norm(), activation=True).double()  # a function, which no module shows
    with pytest.raises(ValueError, match=r"computes more from 'body' .* hand the method a teacher_head"):
        head_of(teacher, "body", teacher.body(IMAGES))
    images, labels = torch.randn(2, 3, 160, 160), torch.tensor([0, 1])
    vit = timm.create_model("test_vit", num_classes=5)  # scores of the class token, which a map lacks
    nn.init.normal_(vit.cls_token)
    distiller = Distiller(net(8), vit, example=images, method=SRRL)
    with pytest.raises(ValueError, match="such as a class token"):
        distiller(images, labels=labels)
    _, losses = distiller(images, teacher_head=lambda feature: feature.mean((2, 3)))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_gradient_reaches_the_feature_but_not_the_teacher() -> None:
    teacher = net(7).double()
    feature = torch.randn(3, 7, 7, 9, dtype=torch.float64, requires_grad=True)
    head_of(teacher, "0", teacher[0](IMAGES))(feature).sum().backward()
    assert feature.grad is not None
    assert feature.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("method", [SRRL, MasKD])
@pytest.mark.parametrize("precision", ["same", "bf16", "fp16"])
def test_distiller_hands_it_to_the_method_that_wants_it(method, precision) -> None:
    images, labels = torch.randn(4, 3, 9, 9), torch.tensor([0, 1, 2, 3])
    options = TeacherOptions(precision=precision)
    distiller = Distiller(net(4), net(7), [Pair("0", method=method)], example=images, teacher_options=options)
    _, losses = distiller(images, labels=labels)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())


def test_teacher_without_a_fitting_layer_says_what_to_hand_over() -> None:
    teacher = net(7).double()
    with pytest.raises(ValueError, match=r"takes 7, but the feature has 3 channels.* teacher_head"):
        rest_of(teacher, "missing", IMAGES, IMAGES, teacher(IMAGES))
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh()).double()
    with pytest.raises(ValueError, match="is missing"):
        rest_of(conv, "1", IMAGES, conv(IMAGES), conv(IMAGES).mean((2, 3)))
