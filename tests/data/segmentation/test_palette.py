import numpy as np
import pytest

from diffkd.data import palette


def test_the_colours_of_voc():
    colours = palette(256)
    assert colours.dtype == np.uint8
    assert colours[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]


@pytest.mark.parametrize(("name", "count"), [("voc", 5000), ("cityscapes", 19)])
def test_colours_differ(name, count):
    assert len(np.unique(palette(count, name), axis=0)) == count


def test_cityscapes_has_its_own():
    assert palette(19, "cityscapes")[[0, 13]].tolist() == [[128, 64, 128], [0, 0, 142]]
    assert palette(0, "cityscapes").shape == palette(0).shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((20, "cityscapes"), "20 classes, but .* 0 to 19"), ((-1,), "-1 classes"), ((3, "ade"), "no palette 'ade'")],
)
def test_what_there_is_no_colour_for_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        palette(*arguments)
