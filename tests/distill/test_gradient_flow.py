import warnings
from functools import partial

import pytest
import torch
from small_distillers import IMAGES, distil
from small_nets import ConvNet
from torch.utils.checkpoint import checkpoint

from diffkd import KD, FitNet, Pair
from diffkd.distill.checks import GradientWarning


class Ungraded(ConvNet):
    """Computes its stem without gradients, and the rest as `how` says."""

    how = staticmethod(lambda stage, x: stage(x))

    def forward(self, images):
        with torch.no_grad():
            x = self.stem(images)
        return self.fc(self.pool(self.how(self.stage, x)).flatten(1))


class Recomputed(Ungraded):
    how = staticmethod(partial(checkpoint, use_reentrant=True))


def frozen_stem():
    student = ConvNet()
    student.stem.requires_grad_(False)
    return student


STAGES = [Pair("stem", method=FitNet), Pair("stage", method=FitNet), Pair("output", method=KD)]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(
    ("student", "silent"),
    [(ConvNet, []), (frozen_stem, ["stem"]), (Ungraded, ["stem"]), (Recomputed, ["stem", "stage"])],
)
def test_pairs_without_gradient_are_named_once(student, silent):
    distiller = distil(student(), pairs=STAGES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradientWarning)
        for _ in range(2):
            distiller(IMAGES)
    texts = [str(warning.message) for warning in caught if warning.category is GradientWarning]
    assert len(texts) == len(silent)
    for text, layer in zip(texts, silent, strict=True):
        assert f"pair '{layer}': the output of the student's '{layer}' carries no gradient" in text
    if silent:
        with pytest.raises(ValueError, match="carries no gradient"):
            distiller.check_gradients()
    else:
        distiller.check_gradients()


def test_one_of_several_levels_without_gradient_is_named_but_allowed():
    class Sum(FitNet):
        def __init__(self, student, teacher):
            super().__init__(student[1], teacher[1])

        def forward(self, student, teacher):
            return super().forward(student[1], teacher[1])

    distiller = distil(frozen_stem(), pairs=[Pair(["stem", "stage"], method=Sum, name="levels")])
    with pytest.warns(GradientWarning, match="pair 'levels': the output of the student's 'stem' carries"):
        distiller(IMAGES)
    distiller.check_gradients()


def test_looking_without_training_warns_of_nothing():
    distiller = distil(frozen_stem(), pairs=STAGES)
    with torch.no_grad():
        distiller(IMAGES)
    distiller.eval()(IMAGES)
    distiller.check_gradients()


def test_a_compiled_distiller_can_be_asked():
    distiller = distil(frozen_stem(), pairs=STAGES)
    torch.compile(distiller, backend="eager")(IMAGES)
    with pytest.raises(ValueError, match="pair 'stem'"):
        distiller.check_gradients()
