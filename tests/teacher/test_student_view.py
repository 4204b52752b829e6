"""A teacher whose input is made inside the student."""

import pytest
import torch
from torch import nn

from diffkd import FGD, Distiller, FitNet, Pair
from diffkd.teacher.view import StudentView

IMAGES = torch.randn(2, 3, 16, 16)


class Shrinks(nn.Module):
    """Draws a size in training, as detectors do."""

    def __init__(self):
        super().__init__()
        self.transform = Transform()
        self.body = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        return self.body(self.transform(images)["pixels"]).mean(dim=(2, 3))


class Transform(nn.Module):
    def forward(self, images):
        size = int(torch.randint(6, 12, ())) if self.training else 8
        return {"pixels": images[..., :size, :size], "size": size}


class View:
    layers = ("transform",)

    def __init__(self):
        self.seen = []

    def __call__(self, inputs, calls):
        self.seen.append((inputs, calls["transform"]))
        return calls["transform"].output["pixels"]

    def context(self, inputs, calls):
        return {"boxes": [torch.tensor([[0.0, 0.0, 0.5, 0.5]])] * len(inputs)}


def distiller(method=FitNet):
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
    view = View()
    return Distiller(Shrinks(), teacher, [Pair("body", "0", method)], example=IMAGES, teacher_input=view), view


def test_the_teacher_sees_what_the_student_made_of_the_images():
    model, view = distiller()
    assert isinstance(view, StudentView)
    for _ in range(4):
        seen = {}
        handle = model.teacher[0].register_forward_pre_hook(lambda module, args, seen=seen: seen.update(x=args[0]))
        model(IMAGES)
        handle.remove()
        inputs, call = view.seen[-1]
        assert inputs is IMAGES
        assert call.args[0] is IMAGES
        assert seen["x"].shape[-1] == call.output["size"]
        assert torch.equal(seen["x"], call.output["pixels"])


def test_methods_get_what_the_view_knows():
    model, _ = distiller(FGD)
    losses = model(IMAGES)[1]
    assert set(losses) == {"body/kd", "body/attention", "body/relation"}
    with pytest.raises(ValueError, match="boxes for each of 2 images"):
        model(IMAGES, boxes=[torch.zeros(0, 4)])  # what the caller says counts


def test_such_a_teacher_cannot_be_asked_alone():
    model, _ = distiller()
    with pytest.raises(TypeError, match="while the student runs"):
        model.teach(IMAGES)


def test_nothing_is_held_on_to():
    model, _ = distiller()
    model(IMAGES)
    assert model._student_recorder.calls == {}
