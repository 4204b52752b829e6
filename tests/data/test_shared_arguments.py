"""Arguments that a data module passes on to its base are arguments of its own: for signatures, records and typos."""

import inspect
from typing import Any

import pytest

from diffkd import data
from diffkd.data.image_data import ImageData

SEGMENTATION = ("batch_size", "augmentation", "seed", "crop_size", "resize", "num_workers", "mean", "std")
DETECTION = ("batch_size", "augmentation", "seed", "keep_empty", "num_workers", "on_bad_image", "min_size", "max_size")


@pytest.mark.parametrize(
    ("module", "shared"),
    [(name, SEGMENTATION) for name in ("Ade20k", "Cityscapes", "MaskFolder", "VocSegmentation")]
    + [(name, DETECTION) for name in ("CocoDetection", "VocDetection", "YoloDetection")],
)
def test_the_signature_shows_the_shared_arguments(module, shared):
    parameters = inspect.signature(getattr(data, module)).parameters
    assert set(shared) < set(parameters)
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert len(parameters) == len(set(parameters))


def test_leading_arguments_of_segmentation_stay_in_their_places():
    for module in (data.Ade20k, data.Cityscapes, data.MaskFolder, data.VocSegmentation):
        assert list(inspect.signature(module).parameters)[:4] == ["root", "batch_size", "augmentation", "seed"]


def test_what_the_base_is_handed_by_place_is_no_argument():
    class Base(ImageData):
        def __init__(self, loaders: Any, /, *, shared: int = 1, other: int = 2) -> None: ...

    class Passes(Base):
        def __init__(self, root: str, other: int = 3, **options: Any) -> None: ...

    class Closed(Passes):
        def __init__(self, root: str) -> None: ...

    class Same(Closed):
        """Without a constructor of its own."""

    assert str(inspect.signature(Passes)) == "(root: str, other: int = 3, *, shared: int = 1)"
    assert str(inspect.signature(Closed)) == str(inspect.signature(Same)) == "(root: str)"
