import pytest
import torch
from PIL import Image

from diffkd.reports.predictions import draw_boxes

IMAGES = [torch.rand(3, 40, 60), torch.rand(3, 50, 30)]
NONE = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
ONE = {"boxes": torch.tensor([[5.0, 5.0, 25.0, 35.0]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.4])}


def drawn(path, **columns):
    draw_boxes(path, IMAGES, columns, ("cat",), threshold=0.3)
    with Image.open(path) as picture:
        return picture.convert("RGB").copy()


def test_what_is_found_is_seen(tmp_path):
    nothing = drawn(tmp_path / "a.png", student=[NONE, NONE])
    unsure = drawn(tmp_path / "b.png", student=[ONE | {"scores": torch.tensor([0.2])}, NONE])
    found = drawn(tmp_path / "c.png", student=[ONE, NONE])
    assert nothing.tobytes() == unsure.tobytes() != found.tobytes()
    assert drawn(tmp_path / "d.png", student=[ONE, ONE], truth=[NONE, ONE]).width > found.width


def test_many_classes_and_no_scores(tmp_path):
    target = {"boxes": torch.tensor([[1.0, 2.0, 9.0, 9.0]]), "labels": torch.tensor([13])}
    path = draw_boxes(tmp_path / "x.svg", IMAGES[:1], {"truth": [target]}, [f"class {index}" for index in range(13)])
    assert "<!-- class 12 -->" in path.read_text(encoding="utf-8")


def test_names_are_no_formulas_and_leave_room_for_the_picture(tmp_path):
    names = [r"a$\frac$", *(f"class {index}" for index in range(1, 400))]
    text = draw_boxes(tmp_path / "x.svg", IMAGES, {"truth": [NONE, NONE]}, names).read_text(encoding="utf-8")
    assert r"<!-- a$\frac$ -->" in text
    assert ("<!-- class 39 -->" in text, "<!-- class 40 -->" in text) == (True, False)


def test_columns_must_fit_the_images(tmp_path):
    with pytest.raises(ValueError, match="column 'teacher' has 1 entries for 2 images"):
        draw_boxes(tmp_path / "x.png", IMAGES, {"teacher": [NONE]}, ("cat",))
    with pytest.raises(ValueError, match="no picture"):
        draw_boxes(tmp_path / "x.png", [], {"teacher": []}, ("cat",))
