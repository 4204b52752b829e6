import json
from pathlib import Path

import pytest
from PIL import Image

from diffkd.compare import DEFAULT_METHODS
from diffkd.demo import demo
from diffkd.tasks.evaluation import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    demo(out, seeds=1, epochs=1, jobs=1)
    return out


def test_every_method_is_trained_and_in_the_table(folder: Path) -> None:
    table = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in table["rows"]] == list(DEFAULT_METHODS)
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
