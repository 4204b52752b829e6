"""Means of losses, and the first step at which one was not finite."""

import io

import pytest
import torch

from diffkd.training.loss_log import LossLog

IMAGES = torch.zeros(2, 3, 4, 4)


def record(log, step, images=IMAGES, **values):
    log.record(step, {name: torch.as_tensor(value) for name, value in values.items()}, images)


def test_means_and_latest():
    log = LossLog()
    for step, (task, gamma) in enumerate([(1.0, [0.5, 0.7]), (3.0, [0.1, 0.3])]):
        record(log, step, task=task, gamma=gamma)
    assert log.means() == pytest.approx({"task": 2.0, "gamma": 0.4})
    assert log.latest() == pytest.approx({"task": 3.0, "gamma": 0.2})
    log.check()
    log.clear()
    assert log.means() == log.latest() == {}


def test_the_first_broken_step_and_its_terms_are_named():
    log = LossLog()
    record(log, 10, task=1.0, **{"layer4/kd": 1.0, "layer4/diffusion": 1.0})
    record(log, 11, task=1.0, **{"layer4/kd": 1.0, "layer4/diffusion": float("inf")})
    record(log, 12, task=float("nan"), **{"layer4/kd": float("nan"), "layer4/diffusion": float("nan")})
    with pytest.raises(
        FloatingPointError, match="'layer4/diffusion' was not finite at step 11; the images were finite"
    ):
        log.check()


def test_the_learning_rate_is_not_blamed_for_the_first_step():
    log = LossLog()
    record(log, 0, kd=float("nan"))
    with pytest.raises(FloatingPointError, match=r"at step 0; .*look at the models and the method's values"):
        log.check()


def test_bad_images_are_blamed():
    log = LossLog()
    images = IMAGES.clone()
    images[1, 2, 3, 3] = float("nan")
    record(log, 7, images, task=float("nan"), kd=float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"losses 'task', 'kd' was not finite at step 7; the images .* held NaN"
    ):
        log.check()


def test_bad_images_are_an_error_even_if_the_losses_survive():
    log = LossLog()
    record(log, 7, torch.full((2, 3), float("inf")), task=1.0)
    with pytest.raises(FloatingPointError, match="a batch was not finite at step 7"):
        log.check()


def test_names_must_stay():
    log = LossLog()
    record(log, 0, task=1.0)
    with pytest.raises(ValueError, match="step 1"):
        record(log, 1, task=1.0, kd=1.0)


def test_order_of_names_does_not_matter():
    log = LossLog()
    record(log, 0, task=1.0, kd=10.0)
    record(log, 1, kd=10.0, task=1.0)
    assert log.means() == {"task": 1.0, "kd": 10.0}


def test_half_an_epoch_can_be_saved():
    whole, first, second = LossLog(), LossLog(), LossLog()
    for step in range(3):
        record(whole, step, task=step / 7)
        record(first, step, task=step / 7)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for log in (whole, second):
        record(log, 3, task=0.9)
    assert second.means() == whole.means()


def test_a_broken_step_is_not_forgotten_by_saving():
    log, other = LossLog(), LossLog()
    record(log, 5, task=float("nan"))
    other.load_state_dict(log.state_dict())
    with pytest.raises(FloatingPointError, match="step 5"):
        other.check()


def test_gradients_are_not_kept():
    log = LossLog()
    weight = torch.ones((), requires_grad=True)
    log.record(0, {"task": weight * 2}, IMAGES)
    assert not log.state_dict()["sums"].requires_grad
