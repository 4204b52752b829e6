"""The exponential moving average of a student."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffkd import DiffKD, Distiller
from diffkd.training.ema import StudentEMA


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def walk(student, steps):
    """Change parameters and BatchNorm's buffers as training does."""
    for _ in range(steps):
        student.train()(torch.randn(4, 3, 8, 8))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += torch.randn_like(parameter)
        yield


def test_it_is_torchs_average():
    student = net()
    ours = StudentEMA(student, 0.9)
    theirs = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in walk(student, 4):
        ours.update(student)
        theirs.update_parameters(student)
    assert ours.updates == 4
    state = theirs.module.state_dict()
    for name, value in ours.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, state[name], rtol=0, atol=0)
        else:  # a count of batches has no average
            assert value == student.state_dict()[name]


def test_saved_and_loaded_it_goes_on():
    student = net()
    first = StudentEMA(student, 0.5)
    second = StudentEMA(net(), 0.5)
    for number, _ in enumerate(walk(student, 4)):
        first.update(student)
        if number == 1:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        elif number > 1:
            second.update(student)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


def test_it_neither_trains_nor_is_distilled():
    student = net()
    distiller = Distiller(student, net(), example=torch.randn(2, 3, 8, 8), method=DiffKD)
    average = StudentEMA(distiller.student, 0.9)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert not average.model.training
    average.model(torch.randn(2, 3, 8, 8))
    distiller(torch.randn(2, 3, 8, 8))
    assert average.model.state_dict().keys() == student.state_dict().keys()


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, 9999])
def test_nonsense_is_refused(decay):
    with pytest.raises(ValueError, match=r"such as 0\.9999"):
        StudentEMA(net(), decay)
