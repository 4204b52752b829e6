"""The demo of detection, cut short."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from diffkd.commands import demo_detection
from diffkd.commands.evaluate import evaluate
from diffkd.recipes import find_recipe


def test_the_demo_trains_compares_and_draws(tmp_path, monkeypatch):
    """The whole way, on fewer scenes."""
    recipe = find_recipe(demo_detection.RECIPE).read_text()
    shorter = recipe.replace("train_count: 640", "train_count: 16").replace("val_count: 80", "val_count: 8")
    assert shorter != recipe
    (tmp_path / "short.yaml").write_text(shorter)
    monkeypatch.setattr(demo_detection, "RECIPE", str(tmp_path / "short.yaml"))
    out = tmp_path / "out"
    printed = io.StringIO()
    rows = demo_detection.detection_demo(out, 1, 1, 1, Console(file=printed, width=20))
    assert printed.getvalue().splitlines()[-1] == f"diffkd test {out / 'student.safetensors'}"
    assert [row.method for row in rows] == ["alone", "fitnet", "diffkd-ae"]
    table = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert table["metric"] == "ap"
    with Image.open(out / "boxes.png") as picture:
        assert picture.width > 800
    measured = evaluate(str(out / "student.safetensors"), progress=False)
    assert 100 * measured["ap"] == pytest.approx(table["rows"][-1]["last"], abs=1e-6)
