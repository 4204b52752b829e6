from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import assert_rounded, units_of

from diffkd.reports.plots import draw_results, saliency


def test_saliency_is_equation_10() -> None:
    feature = torch.randn(2, 5, 3, 4)

    def equation(x: torch.Tensor) -> torch.Tensor:
        strength = torch.stack([x[:, i // 4, i % 4].mean() for i in range(12)])
        return (12 * torch.exp(strength / 0.5) / torch.exp(strength / 0.5).sum()).reshape(3, 4)

    assert_rounded(
        {"map": saliency(feature)},
        lambda: {"map": torch.stack([equation(x) for x in feature.double()])},
        units_of(torch.float32),
    )


def test_saliency_of_a_flat_feature_is_one_everywhere() -> None:
    assert torch.allclose(saliency(torch.full((1, 3, 5, 7), 2.0)), torch.ones(1, 5, 7))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curves_and_maps_are_drawn(tmp_path: Path, suffix: str) -> None:
    maps = {"student": saliency(torch.randn(2, 4, 6, 6)), "teacher": saliency(torch.randn(2, 4, 6, 6))}
    curves = {"alone": [[50.0, 60.0], [52.0, 61.0]], "diffkd": [[55.0, 66.0], [56.0, 65.0]]}
    path = draw_results(tmp_path / f"picture.{suffix}", curves, torch.randn(2, 1, 28, 28), maps)
    if suffix == "png":
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100
            assert picture.width > picture.height
    else:
        assert path.read_text(encoding="utf-8").count("<path") > 20


def test_curves_alone_need_no_maps(tmp_path: Path) -> None:
    with Image.open(draw_results(tmp_path / "a.png", {"kd": [[1.0, 2.0]]})) as picture:
        assert picture.format == "PNG"


def test_curves_of_unequal_length_are_drawn_as_far_as_they_go(tmp_path: Path) -> None:
    path = draw_results(tmp_path / "a.svg", {"kd": [[1.0, 2.0, 3.0], [1.0, 2.0], [1.5]], "dist": [[1.0] * 5]})
    assert "<path" in path.read_text(encoding="utf-8")
