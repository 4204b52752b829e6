"""The demo of detection, cut short."""

import io
import json
import re

import pytest
from PIL import Image
from rich.console import Console

from diffkd.commands.compare import RECOMMENDED
from diffkd.commands.demos import detection
from diffkd.commands.evaluate import evaluate
from diffkd.data import DetectionScenes
from diffkd.export.student_file import find_weights, read_card
from diffkd.recipes import find_recipe


def test_the_demo_trains_compares_and_draws(tmp_path, monkeypatch):
    """The whole way, on fewer scenes."""
    recipe = find_recipe(detection.RECIPE).read_text()
    shorter, count = re.subn(r"(train_count|val_count|batch_size): \d+", r"\1: 5", recipe)
    assert count == 3
    (tmp_path / "short.yaml").write_text(shorter)
    monkeypatch.setattr(detection, "RECIPE", str(tmp_path / "short.yaml"))
    out = tmp_path / "out"
    printed = io.StringIO()
    rows = detection.detection_demo(out, 1, 1, 1, Console(file=printed, width=20))
    assert printed.getvalue().splitlines()[-1] == f"diffkd test {out / 'student.safetensors'}"
    assert [row.method for row in rows] == list(detection.METHODS)
    table = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert table["metric"] == "ap"
    with Image.open(out / "boxes.png") as picture:
        assert picture.width > 800
    measured = evaluate(str(out / "student.safetensors"), progress=False)
    kept = next(row for row in table["rows"] if row["method"] == RECOMMENDED)
    assert 100 * measured["ap"] == pytest.approx(kept["last"], abs=1e-6)


def test_the_packaged_teacher_does_as_well_as_its_card_says():
    weights = find_weights(detection.TEACHER)
    assert weights.stat().st_size < 4_000_000
    card = read_card(weights)
    assert card["metrics"]["ap"] > 0.5
    few = DetectionScenes(**(card["data"]["init_args"] | {"train_count": 2, "val_count": 48}))
    assert evaluate(str(weights), data=few, progress=False)["ap"] > 0.45
