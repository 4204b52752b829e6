"""Means of losses, and the first step at which one was not finite."""

import io

import pytest
import torch

from diffkd.training.loss_log import Ledger

IMAGES = torch.zeros(2, 3, 4, 4)


def record(ledger, step, images=IMAGES, **values):
    ledger.record(step, {name: torch.as_tensor(value) for name, value in values.items()}, images)


def test_means_and_latest():
    ledger = Ledger()
    for step, (task, gamma) in enumerate([(1.0, [0.5, 0.7]), (3.0, [0.1, 0.3])]):
        record(ledger, step, task=task, gamma=gamma)
    assert ledger.means() == pytest.approx({"task": 2.0, "gamma": 0.4})
    assert ledger.latest() == pytest.approx({"task": 3.0, "gamma": 0.2})
    ledger.check()
    ledger.clear()
    assert ledger.means() == ledger.latest() == {}


def test_the_first_broken_step_and_its_terms_are_named():
    ledger = Ledger()
    record(ledger, 10, task=1.0, **{"layer4/kd": 1.0, "layer4/diffusion": 1.0})
    record(ledger, 11, task=1.0, **{"layer4/kd": 1.0, "layer4/diffusion": float("inf")})
    record(ledger, 12, task=float("nan"), **{"layer4/kd": float("nan"), "layer4/diffusion": float("nan")})
    with pytest.raises(
        FloatingPointError, match="'layer4/diffusion' was not finite at step 11; the images were finite"
    ):
        ledger.check()


def test_the_learning_rate_is_not_blamed_for_the_first_step():
    ledger = Ledger()
    record(ledger, 0, kd=float("nan"))
    with pytest.raises(FloatingPointError, match=r"at step 0; .*look at the models and the method's values"):
        ledger.check()


def test_bad_images_are_blamed():
    ledger = Ledger()
    images = IMAGES.clone()
    images[1, 2, 3, 3] = float("nan")
    record(ledger, 7, images, task=float("nan"), kd=float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"losses 'task', 'kd' was not finite at step 7; the images .* held NaN"
    ):
        ledger.check()


def test_bad_images_are_an_error_even_if_the_losses_survive():
    ledger = Ledger()
    record(ledger, 7, torch.full((2, 3), float("inf")), task=1.0)
    with pytest.raises(FloatingPointError, match="a batch was not finite at step 7"):
        ledger.check()


def test_names_must_stay():
    ledger = Ledger()
    record(ledger, 0, task=1.0)
    with pytest.raises(ValueError, match="step 1"):
        record(ledger, 1, task=1.0, kd=1.0)


def test_order_of_names_does_not_matter():
    ledger = Ledger()
    record(ledger, 0, task=1.0, kd=10.0)
    record(ledger, 1, kd=10.0, task=1.0)
    assert ledger.means() == {"task": 1.0, "kd": 10.0}


def test_half_an_epoch_can_be_saved():
    whole, first, second = Ledger(), Ledger(), Ledger()
    for step in range(3):
        record(whole, step, task=step / 7)
        record(first, step, task=step / 7)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for ledger in (whole, second):
        record(ledger, 3, task=0.9)
    assert second.means() == whole.means()


def test_a_broken_step_is_not_forgotten_by_saving():
    ledger, other = Ledger(), Ledger()
    record(ledger, 5, task=float("nan"))
    other.load_state_dict(ledger.state_dict())
    with pytest.raises(FloatingPointError, match="step 5"):
        other.check()


def test_gradients_are_not_kept():
    ledger = Ledger()
    weight = torch.ones((), requires_grad=True)
    ledger.record(0, {"task": weight * 2}, IMAGES)
    assert not ledger.state_dict()["sums"].requires_grad
