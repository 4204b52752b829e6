import json
from pathlib import Path

import pytest
from PIL import Image

from diffkd.commands.demos import classification, demo
from diffkd.commands.evaluate import evaluate
from diffkd.recipes import find_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, each of its runs ended after 20 of 63 steps."""
    place = tmp_path_factory.mktemp("demo")
    recipe = place / "short.yaml"
    recipe.write_text(
        find_recipe(classification.RECIPE).read_text(encoding="utf-8") + "max_steps: 20\n", encoding="utf-8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classification, "RECIPE", str(recipe))
        demo(place / "out", seeds=1, epochs=1, jobs=1)
    return place / "out"


def test_every_method_is_trained_and_in_the_table(folder: Path) -> None:
    table = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in table["rows"]] == list(classification.METHODS)
    assert all(10 < row["last"] <= 100 for row in table["rows"])
    assert len({row["parameters"] for row in table["rows"]}) == 1
    for suffix in ("md", "tex"):
        assert "diffkd" in (folder / f"comparison.{suffix}").read_text(encoding="utf-8")


def test_the_saved_student_evaluates_to_the_accuracy_in_the_table(folder: Path) -> None:
    table = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    measured = evaluate(str(folder / "student.safetensors"), progress=False)
    assert 100 * measured["top1"] == pytest.approx(table["rows"][-1]["last"], abs=1e-6)


def test_the_picture_is_drawn(folder: Path) -> None:
    with Image.open(folder / "demo.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize("values", [{"seeds": 0}, {"jobs": 0}])
def test_nothing_is_not_taken_for_the_default(tmp_path: Path, values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one seed and job"):
        demo(tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()
