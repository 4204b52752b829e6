"""Methods that keep something of every training image are told how many there are."""

from functools import partial

import pytest
from short_trainings import arrays, train

from diffkd import CRD, KD, Pair
from diffkd.tasks.build_training import build_training


@pytest.fixture
def build(image_files, model_file):
    def build(**options):
        data, models = arrays(image_files), (f"{model_file}:small", f"{model_file}:large")
        return build_training(models[0], data, teacher=models[1], accelerator="cpu", **options).distiller.methods

    return build


@pytest.mark.parametrize("method", [CRD, partial(CRD, samples=None, dim=4), partial(CRD, samples=60)])
def test_the_number_is_that_of_the_data(build, method):
    for methods in (build(method=[method]), build(pairs=[Pair("0", method=method)]), build(method=[KD, method])):
        assert [one.samples for one in methods if isinstance(one, CRD)] == [60]


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
