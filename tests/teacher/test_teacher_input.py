import pytest
import torch

from diffkd import TeacherInput

ONES, HALVES = (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(raw, mean, std):
    return (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_images_are_normalised_anew():
    raw = torch.rand(2, 3, 8, 6)
    turn = TeacherInput(MEAN, STD, HALVES, HALVES)
    torch.testing.assert_close(turn(normalised(raw, MEAN, STD)), normalised(raw, HALVES, HALVES), rtol=1e-5, atol=1e-5)


def test_the_same_normalisation_changes_nothing():
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(TeacherInput(MEAN, STD, MEAN, STD)(images), images)


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (4, 3)])
def test_images_are_resized(size):
    turn = TeacherInput(HALVES, ONES, HALVES, ONES, size=size)
    images = torch.full((2, 3, 8, 8), 0.7)
    assert turn(images).shape == (2, 3, *size)
    torch.testing.assert_close(turn(images), torch.full((2, 3, *size), 0.7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_images_keep_their_type(dtype):
    turn = TeacherInput(MEAN, STD, HALVES, HALVES)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(turn(images.to(dtype)), turn(images).to(dtype), rtol=2e-2, atol=5e-2)


def test_images_may_lie_on_another_device_than_the_buffers():
    assert TeacherInput(MEAN, STD, HALVES, HALVES)(torch.empty(1, 3, 4, 4, device="meta")).device.type == "meta"


def test_it_leaves_no_trace_in_a_state():
    assert not TeacherInput(MEAN, STD, HALVES, HALVES).state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MEAN, STD, (0.5,), (0.5,)), "one value per channel each, got 3, 3, 1 and 1"),
        ((MEAN, (0.2, 0.0, 0.2), MEAN, STD), "must be above 0"),
    ],
)
def test_bad_statistics_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TeacherInput(*arguments)
