import pytest
import torch

from diffkd import DiffKD, FeatureShape, FitNet
from diffkd.methods.shared import Shared

LEVELS = [FeatureShape(6, (4, 4)), FeatureShape(6, (2, 2)), FeatureShape(5, (1, 1))]
THEIRS = [FeatureShape(8, (4, 4)), FeatureShape(8, (2, 2)), FeatureShape(8, (1, 1))]


def maps(shapes):
    return [torch.randn(2, shape.channels, *shape.size) for shape in shapes]


def test_it_is_the_sum_over_the_levels():
    shared = Shared(LEVELS, THEIRS, method=FitNet)
    assert shared.which == [0, 0, 1]
    ours, theirs = maps(LEVELS), maps(THEIRS)
    expected = sum(shared.methods[i](a, b)["kd"] for i, a, b in zip((0, 0, 1), ours, theirs, strict=True))
    output = shared(ours, theirs)
    torch.testing.assert_close(output.losses["kd"], expected)
    assert output.gamma is None


def test_levels_of_other_sizes_are_resized_and_gammas_kept():
    output = Shared(LEVELS[:2], THEIRS[:2])(maps([LEVELS[0]] * 2), maps(THEIRS[:2]))
    assert set(output.losses) == {"kd", "diffusion"}
    assert output.gamma.shape == (4,)
    assert [result.denoised.shape for result in output.results] == [(2, 8, 4, 4), (2, 8, 2, 2)]


def test_single_layers_and_uneven_levels_are_refused():
    with pytest.raises(ValueError, match="several levels"):
        Shared(LEVELS[0], THEIRS[0], method=DiffKD)
    for ours, theirs in (([], []), (LEVELS, THEIRS[:2])):
        with pytest.raises(ValueError, match="as many levels of both"):
            Shared(ours, theirs)
