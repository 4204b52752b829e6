"""What the teacher would run after the last layer that is wanted is left out, and nothing else changes."""

import copy
from collections import Counter

import pytest
import torch
from small_distillers import IMAGES, backward, distil
from small_nets import ConvNet
from torch import nn

from diffkd import KD, FitNet, Pair
from diffkd.features.recorder import Recorder


def counted(model):
    """Return a model, and a count of the calls of its modules by name."""
    calls = Counter()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: calls.update([name]))
    return model, calls


def feature(*layers):
    return [Pair(layer, method=FitNet) for layer in layers]


@pytest.mark.parametrize(
    ("layers", "run", "left_out"),
    [
        (("stem",), {"stem", "stem.2"}, {"stage", "stage.0", "pool", "fc"}),
        (("stage", "stem"), {"stem", "stage.2"}, {"pool", "fc"}),
        (("stage.0", "stage"), {"stage.2"}, {"pool", "fc"}),
    ],
)
def test_later_layers_do_not_run(layers, run, left_out):
    teacher, calls = counted(ConvNet(12))
    teacher.stage[0].register_buffer("unused", torch.zeros(1))
    distiller = distil(teacher=teacher, pairs=feature(*layers))
    calls.clear()
    backward(distiller)
    assert {name for name in run if calls[name] != 1} == set()
    assert {name for name in left_out if calls[name]} == set()
    assert calls[""] == 1


def test_the_output_wants_all_of_it():
    teacher, calls = counted(ConvNet(12))
    distiller = distil(teacher=teacher, pairs=[*feature("stem"), Pair("output", method=KD)])
    calls.clear()
    backward(distiller)
    assert set(calls.values()) == {1}


def test_losses_and_gradients_are_those_of_the_whole_run():
    distiller = distil(pairs=feature("stem", "stage"))
    twin = copy.deepcopy(distiller)
    record = twin._sources[0].recorder.record
    twin._sources[0].recorder.record = lambda model, inputs, *, whole: record(model, inputs)
    for one in (distiller, twin):
        torch.manual_seed(2)
        _, one.seen = backward(one)
    assert all(torch.equal(distiller.seen[name], twin.seen[name]) for name in twin.seen)
    for ours, theirs in zip(distiller.student.parameters(), twin.student.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


def test_the_student_and_whole_teachers_run_on():
    teacher, calls = counted(ConvNet(12))
    distiller = distil(teacher=teacher, pairs=feature("stem"))
    calls.clear()
    assert distiller(IMAGES)[0].shape == (4, 10)
    assert torch.equal(distiller.teach(IMAGES), teacher(IMAGES))
    assert calls["fc"] == 2
    copied = copy.deepcopy(distiller)
    copied(IMAGES)
    assert calls["fc"] == 2


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.wrong = False

    def forward(self, x):
        if self.wrong:
            raise KeyError("lost")
        return x


def test_errors_of_the_teacher_pass_through():
    fails = Fails()
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), fails, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(576, 10))
    distiller = distil(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), teacher, [Pair("0", "2", method=FitNet)])
    distiller(IMAGES)
    fails.wrong = True
    with pytest.raises(KeyError, match="lost"):
        distiller(IMAGES)
    fails.wrong = False
    distiller(IMAGES)


class Swallows(ConvNet):
    """Takes whatever happens inside for an error of its own."""

    def forward(self, images):
        try:
            return super().forward(images)
        except Exception as error:
            raise RuntimeError("the teacher has failed") from error


class Hides(ConvNet):
    """Answers, whatever happens inside."""

    def forward(self, images):
        try:
            return super().forward(images)
        except Exception:
            return torch.zeros(len(images), 10)


@pytest.mark.parametrize("teacher", [Swallows, Hides])
def test_models_that_catch_all(teacher):
    model = teacher(12)
    distiller = distil(teacher=model, pairs=feature("stage"))
    assert torch.equal(distiller.teacher_features(IMAGES)["stage"], model.stage(model.stem(IMAGES)))


def test_elements_and_watched_calls_are_waited_for():
    model, calls = counted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()))
    recorder = Recorder(["0"], ["2"])
    recorder.attach(model)
    recording = recorder.record(model, IMAGES, whole=False)
    assert recording.output is None
    assert set(recording.calls) == {"2"}
    assert set(recording.features) == {"0"}
    assert calls["3"] == 0
    assert recorder.record(model, IMAGES).output is not None


def test_compiled_graphs_hold_the_whole_teacher():
    torch.compiler.reset()
    distiller = distil(pairs=feature("stem"))
    twin = copy.deepcopy(distiller)
    expected = backward(distiller)[1]
    losses = torch.compile(twin, backend="eager", fullgraph=True)(IMAGES)[1]
    torch.testing.assert_close(losses, expected)
    torch.compiler.reset()
