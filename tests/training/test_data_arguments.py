"""Arguments of methods that are set from the data: numbers of training images and classes, labels."""

from functools import partial

import pytest
import tiny_segmenters
from short_trainings import arrays, built, train

from diffkd import CIRKD, CRD, KD, Pair, Shared
from diffkd.data import SegmentationScenes


@pytest.fixture
def build(image_files, model_file):
    def build(**options):
        data, models = arrays(image_files), (f"{model_file}:small", f"{model_file}:large")
        return built(models[0], data, teacher=models[1], accelerator="cpu", **options).distiller.methods

    return build


@pytest.mark.parametrize("method", [CRD, partial(CRD, samples=None, dim=4), partial(CRD, samples=60)])
def test_the_number_is_that_of_the_data(build, method):
    for methods in (build(method=[method]), build(pairs=[Pair("0", method=method)]), build(method=[KD, method])):
        assert [one.samples for one in methods if isinstance(one, CRD)] == [60]
        assert all((one.classes >= 0).all() for one in methods if isinstance(one, CRD))  # and of the class of each


@pytest.mark.parametrize("samples", [20, 50_000])
def test_another_number_is_refused(build, samples):
    with pytest.raises(ValueError, match=rf"CRD is told of {samples} .* the data have 60: leave --method\.samples out"):
        build(method=partial(CRD, samples=samples))


def test_methods_of_a_whole_training_see_samples_that_exist(tmp_path, image_files, model_file):
    result = train(arrays(image_files), tmp_path, model_file, method=partial(CRD, negatives=9), epochs=1)
    assert result["last"]["train/0/kd"] > 0


def test_other_methods_keep_what_they_are_given(build):
    class Drawing(KD):
        def __init__(self, student, teacher, samples=7):
            super().__init__(student, teacher)
            self.samples = samples

    (method,) = build(method=partial(Drawing, samples=3))
    assert method.samples == 3


@pytest.mark.parametrize("method", [partial(Shared, method=CRD), partial(Shared, method=partial(CRD, dim=4))])
def test_a_method_inside_of_another_is_told_too(build, method):
    (shared,) = build(method=method)
    assert [one.samples for one in shared.methods] == [60]


def test_a_method_inside_of_another_may_be_told_wrong(build):
    with pytest.raises(ValueError, match="CRD is told of 20 training images"):
        build(method=partial(Shared, method=partial(CRD, samples=20)))


def relate(**options):
    """Join small segmenters by CIRKD on scenes of eleven classes."""
    file = tiny_segmenters.__file__
    data = SegmentationScenes(train_count=4, val_count=2, size=(16, 16), batch_size=2)
    method = partial(CIRKD, pixel_memory=40, region_memory=8, **options)
    return built(f"{file}:small", data, teacher=f"{file}:large", method=method, accelerator="cpu")


def test_the_number_of_classes_is_that_of_the_data():
    """Labels of classes that a method does not know of would be ignored without a word."""
    assert relate().distiller.methods[0].classes == 11
    assert relate(classes=30).distiller.methods[0].classes == 30
    with pytest.raises(ValueError, match=r"CIRKD is told of 5 classes by classes, but the data have 11"):
        relate(classes=5)
