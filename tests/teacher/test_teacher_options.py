"""The teacher runs faster, and what is learned from it stays the same."""

import copy

import pytest
import torch
from rounding import EXACT
from small_distillers import IMAGES, backward, distil
from small_nets import ConvNet
from torch import nn

from diffkd import DIST, KD, DiffKD, FitNet, Pair, TeacherOptions

METHODS = [DiffKD, FitNet, KD, DIST]


def worn(teacher):
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return teacher.eval()


def losses_of(distiller, images):
    torch.manual_seed(5)
    return distiller(images)[1]


@pytest.mark.parametrize("options", [TeacherOptions(fold=True), TeacherOptions(fold=True, channels_last=True)])
def test_same_losses_and_the_given_teacher_is_untouched(options):
    torch.manual_seed(0)
    teacher, student = worn(ConvNet(12)).double(), ConvNet(4).double()
    before = copy.deepcopy(teacher.state_dict())
    distillers = []
    for one in (TeacherOptions(), options):
        torch.manual_seed(1)
        distillers.append(
            distil(
                copy.deepcopy(student), teacher, method=METHODS, example=IMAGES.double(), teacher_options=one
            ).double()
        )
    expected, got = (losses_of(distiller, IMAGES.double()) for distiller in distillers)
    assert expected.keys() == got.keys()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    assert distillers[0].teacher is teacher
    assert not any(isinstance(module, nn.BatchNorm2d) for module in distillers[1].teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module._forward_hooks for module in copy.deepcopy(distillers[1].teacher).stem[0].modules())


@pytest.mark.parametrize("layer", ["stage.0", "stage.1"])
def test_pairs_on_the_layers_themselves(layer):
    teacher, student, images = worn(ConvNet(12)).double(), ConvNet(4).double(), IMAGES.double()
    teacher.stage[2] = nn.ReLU()  # not in place, so that its neighbour's output can be distilled
    pairs, recorded = [Pair("stage", layer, method=FitNet)], []
    for options in (TeacherOptions(), TeacherOptions(fold=True)):
        distiller = distil(student, teacher, pairs, example=images, teacher_options=options)
        recorded.append(distiller.teacher_features(images)[layer])
    torch.testing.assert_close(recorded[1], recorded[0], **EXACT)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_lower_precision(precision, dtype):
    teacher = worn(ConvNet(12))
    distiller = distil(teacher=teacher, method=METHODS, teacher_options=TeacherOptions(fold=True, precision=precision))
    assert {p.dtype for p in distiller.teacher.parameters()} == {dtype}
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    seen = distiller.eval().observe(IMAGES)["output"].teacher
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, teacher(IMAGES), rtol=0.05, atol=0.05)
    backward(distiller.train())
    assert {p.grad.dtype for p in distiller.parameters()} == {torch.float32}


def test_what_cannot_be():
    with pytest.raises(ValueError, match="precision is 'int8'"):
        TeacherOptions(precision="int8")
    with pytest.raises(ValueError, match="the teacher is compiled already"):
        distil(
            teacher=torch.compile(ConvNet(12), backend="eager"), method=KD, teacher_options=TeacherOptions(fold=True)
        )


def test_features_may_come_from_elsewhere():
    distiller = distil(method=[DiffKD, KD])
    expected = losses_of(distiller, IMAGES)
    features = distiller.teacher_features(IMAGES)
    distiller._sources[0].model = nn.Identity()  # which would not do
    torch.manual_seed(5)
    losses = distiller(IMAGES, teacher_features=features)[1]
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assert all(not feature.requires_grad for feature in features.values())
