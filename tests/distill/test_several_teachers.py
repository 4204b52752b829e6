"""Several teachers: each its own pairs, input, options and weight; the sum of what each would teach alone."""

import copy

import pytest
import torch
from torch import nn

from diffkd import RKD, Balance, Distiller, FitNet, Pair, TeacherInput, TeacherOptions

IMAGES = torch.randn(6, 3, 16, 16)


def net(width, classes=5):
    conv = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


@pytest.fixture
def models():
    return net(4), net(8).eval(), net(12).eval()


def losses_of(distiller):
    return distiller(IMAGES)[1]


def test_the_losses_are_those_of_each_alone(models):
    student, *teachers = models
    view = TeacherInput([0.5] * 3, [0.2] * 3, [0.4] * 3, [0.3] * 3, (12, 12))
    pairs = [Pair("0", method=RKD, name="a"), Pair("2", method=RKD, weight=0.5, source=1, name="b")]
    second = Pair("2", method=RKD, weight=0.5, name="b")
    both = losses_of(Distiller(student, teachers, pairs, example=IMAGES, teacher_input=[None, view]))
    alone = [
        losses_of(Distiller(student, teachers[0], pairs[:1], example=IMAGES)),
        losses_of(Distiller(student, teachers[1], [second], example=IMAGES, teacher_input=view)),
    ]
    assert both == alone[0] | alone[1]


def test_automatic_pairs_are_of_each_teacher_with_its_weight(models):
    student, *teachers = models
    distiller = Distiller(student, teachers, example=IMAGES, method=FitNet, teacher_weights=[1.0, 0.25])
    assert distiller.names == ("teacher0:0", "teacher1:0")
    assert [pair.weight for pair in distiller.pairs] == [1.0, 0.25]
    assert [row[4] for row in distiller.rows()] == ["8x7x7", "12x7x7"]
    assert repr(distiller).startswith("Sequential learns from Sequential and Sequential\n")


def test_teachers_are_frozen_and_in_no_state(models):
    student, *teachers = models
    before = copy.deepcopy([teacher.state_dict() for teacher in teachers])
    distiller = Distiller(student, teachers, example=IMAGES, method=FitNet).train()
    sum(losses_of(distiller).values()).backward()
    own = {id(parameter) for parameter in distiller.parameters()}
    for teacher, state in zip(teachers, before, strict=True):
        assert not teacher.training
        assert not own & {id(parameter) for parameter in teacher.parameters()}
        assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in state.items())
    assert distiller.double().teachers[1][3].weight.dtype == torch.float64


def test_features_can_be_kept_and_given_again(models):
    student, *teachers = models
    distiller = Distiller(student, teachers, example=IMAGES, method=FitNet)
    features = distiller.teacher_features(IMAGES)
    assert list(features) == ["0", "1:0"]
    given = distiller(IMAGES, teacher_features=features)[1]
    assert given == losses_of(distiller)


def test_options_may_be_of_each(models):
    student, *teachers = models
    options = [TeacherOptions(fold=True), TeacherOptions()]
    distiller = Distiller(student, teachers, example=IMAGES, method=FitNet, teacher_options=options)
    assert distiller.teachers[1] is teachers[1]
    assert distiller.teachers[0] is not teachers[0]


def test_standardised_targets_let_no_teacher_drown_another(models):
    student, loud, quiet = models
    with torch.no_grad():
        loud[0][1].weight.mul_(100)

    def shares(**options):
        method = lambda s, t: FitNet(s, t, **options)  # noqa: E731
        pairs = [Pair("0", method=method), Pair("0", method=method, source=1)]
        distiller = Distiller(student, [loud, quiet], pairs, example=IMAGES)
        return [one.item() for one in losses_of(distiller.train()).values()]

    plain, standardised = shares(), shares(standardize=True)
    assert plain[0] > 100 * plain[1]
    assert 0.2 < standardised[0] / standardised[1] < 5


def test_what_does_not_fit_is_refused(models):
    student, *teachers = models
    with pytest.raises(ValueError, match="there is no teacher in the list"):
        Distiller(student, [], example=IMAGES)
    with pytest.raises(ValueError, match="teacher_input has 1 values for 2 teacher"):
        Distiller(student, teachers, example=IMAGES, teacher_input=[None])
    for count in (1, 3):
        with pytest.raises(
            ValueError, match=rf"teacher_weights has {count} values for 2 teacher\(s\): give one for each"
        ):
            Distiller(student, teachers, example=IMAGES, method=FitNet, teacher_weights=[1.0] * count)
    with pytest.raises(ValueError, match=r"weight=-1\.0 of pair 'teacher1:.*' is no factor of a loss: give 0 or more"):
        Distiller(student, teachers, example=IMAGES, method=FitNet, teacher_weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="learns from teacher 2, but there are 2, counted from 0"):
        Distiller(student, teachers, [Pair("0", method=FitNet, source=2)], example=IMAGES)
    with pytest.raises(ValueError, match="no teacher: count from 0"):
        Pair("0", source=-1)
    with pytest.raises(ValueError, match="share parameters"):
        Distiller(student, [teachers[0], student], example=IMAGES)
    with pytest.raises(ValueError, match="layer 'gone' is not in teacher 1"):
        Distiller(student, teachers, [Pair("0", "gone", method=FitNet, source=1)], example=IMAGES)


def test_a_balance_is_measured_over_all(models):
    student, *teachers = models
    distiller = Distiller(student, teachers, example=IMAGES, method=FitNet, balance=Balance(1.0))
    output, losses = distiller(IMAGES)
    task = output.square().mean()
    assert all(loss.item() > 0 for loss in distiller.balance(losses, task).values())
