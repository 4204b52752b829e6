import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.reports.predictions import _overlaid, draw_overlays


@pytest.mark.parametrize(("count", "channels", "classes"), [(1, 1, 1), (3, 3, 7), (2, 3, 150)])
def test_a_picture_is_drawn(tmp_path, count, channels, classes):
    maps = {"student": torch.randint(0, classes, (count, 5, 9)), "truth": torch.randint(0, classes, (count, 10, 18))}
    path = draw_overlays(
        tmp_path / "a.png", torch.randn(count, channels, 10, 18), maps, [str(k) for k in range(classes)]
    )
    with Image.open(path) as picture:
        assert picture.width > 500
        assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 20


def test_an_image_of_one_value_and_no_maps_are_drawn(tmp_path):
    assert draw_overlays(tmp_path / "a.svg", torch.ones(1, 3, 4, 4), {}, ["a"]).read_text().startswith("<?xml")


def test_names_are_no_formulas(tmp_path):
    path = draw_overlays(tmp_path / "a.svg", torch.ones(1, 3, 4, 4), {}, [r"a$\frac$"])
    assert r"<!-- a$\frac$ -->" in path.read_text(encoding="utf-8")


def test_colours_are_laid_over_grey_and_ignored_pixels_are_left():
    pixels = np.stack([np.full((2, 2), 0.3), np.full((2, 2), 0.6), np.full((2, 2), 0.9)], axis=2)
    colours = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    shown = _overlaid(pixels, torch.tensor([[0, 1], [255, 7]]), colours, 255, 0.5)
    assert shown[0, 0] == pytest.approx([0.8, 0.3, 0.3])
    assert shown[0, 1] == pytest.approx([0.3, 0.8, 0.3])
    assert shown[1].flatten() == pytest.approx([0.6] * 6)
    full = _overlaid(pixels, torch.tensor([[0, 1], [255, 7]]).repeat_interleave(3, 0), colours, 255, 0.5)
    assert full.shape == (6, 2, 3)
    assert full[2, 1] == pytest.approx([0.3, 0.8, 0.3])


@pytest.mark.parametrize(
    ("images", "maps", "opacity", "told"),
    [
        (torch.zeros(0, 3, 4, 4), {}, 0.5, "at least one"),
        (torch.zeros(2, 4, 4, 4), {}, 0.5, "1 or 3"),
        (torch.zeros(2, 3, 4, 4), {"student": torch.zeros(1, 4, 4)}, 0.5, "'student' of shape .1, 4, 4."),
        (torch.zeros(2, 3, 4, 4), {}, 1.5, "opacity"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, images, maps, opacity, told):
    with pytest.raises(ValueError, match=told):
        draw_overlays(tmp_path / "a.png", images, maps, ["a"], opacity=opacity)
    assert not list(tmp_path.iterdir())
