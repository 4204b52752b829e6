import copy

import pytest
import torch
from small_distillers import IMAGES, backward, distil
from small_nets import ConvNet
from torch import nn


def test_one_model_twice():
    net = ConvNet()
    with pytest.raises(ValueError, match=r"share parameters: .* copy.deepcopy one of them"):
        distil(net, nn.DataParallel(net))


def test_shared_parameters_must_be_frozen():
    student, teacher = ConvNet(4), ConvNet(4)
    teacher.stem = student.stem
    with pytest.raises(ValueError, match="share parameters"):
        distil(student, teacher)
    student.stem.requires_grad_(False)
    backward(distil(student, teacher))


def test_parameters_that_share_memory():
    student, teacher = ConvNet(4), ConvNet(4)
    teacher.load_state_dict(student.state_dict(), assign=True)
    assert {id(p) for p in student.parameters()}.isdisjoint({id(p) for p in teacher.parameters()})
    with pytest.raises(ValueError, match="share parameters"):
        distil(student, teacher)
    teacher.load_state_dict(copy.deepcopy(student.state_dict()), assign=True)
    distil(student, teacher)


def test_exported_programs():
    program = torch.export.export(ConvNet(8).eval(), (IMAGES,))
    for model in (program, program.module()):
        with pytest.raises(ValueError, match=r"the teacher is of type .* torch.export.unflatten\(program\)"):
            distil(teacher=model)
    assert distil(teacher=torch.export.unflatten(program)).pairs[0].teacher == "stage"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_weights_without_values(side):
    hollow = ConvNet(8)
    hollow.fc.to("meta")
    with pytest.raises(ValueError, match=rf"'fc.weight' of the {side} ConvNet has no values, .*to_empty"):
        distil(**{side: hollow})
