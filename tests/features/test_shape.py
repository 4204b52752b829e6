import pytest

from diffkd import FeatureShape
from diffkd.features.shape import channels_of


def test_maps_and_vectors():
    assert FeatureShape(5, (7, 3)).is_map
    assert not FeatureShape(5).is_map
    assert str(FeatureShape(5, (7, 3))) == "5x7x3"
    assert str(FeatureShape(5)) == "5"
    assert channels_of(FeatureShape(5)) == channels_of(5) == 5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FeatureShape(0), "at least 1 channel, got 0"),
        (lambda: FeatureShape(3, (4,)), r"\(height, width\) for a map or \(\) for a vector, got \(4,\)"),
        (lambda: channels_of(-2), "at least 1 channel, got -2"),
    ],
)
def test_nonsense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
