import pytest

from diffkd.data import Augmentation


def test_the_default_changes_nothing():
    assert not any(value for name, value in vars(Augmentation()).items() if name != "rand_augment_magnitude")


@pytest.mark.parametrize(
    "values",
    [
        {"crop_padding": -1},
        {"rand_augment": -2},
        {"rand_augment_magnitude": 31},
        {"color_jitter": 1.5},
        {"random_erasing": 2.0},
        {"mixup": -0.1},
        {"cutmix": float("nan")},
    ],
)
def test_values_out_of_range_are_named(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"{name}=.*out of range"):
        Augmentation(**values)
