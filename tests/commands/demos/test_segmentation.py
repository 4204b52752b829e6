"""The demonstration of segmentation, with one short epoch."""

import json
import re

import pytest
from PIL import Image
from rich.console import Console

from diffkd.commands.compare import RECOMMENDED
from diffkd.commands.demos.segmentation import METHODS, RECIPE, TEACHER_WEIGHTS, segmentation_demo
from diffkd.commands.evaluate import evaluate
from diffkd.data import SegmentationScenes
from diffkd.export.student_file import find_weights, read_card
from diffkd.recipes import find_recipe
from diffkd.reports.tables import class_table, class_table_of


def test_the_demo(tmp_path):
    """Every method is trained and in both tables, the picture is drawn, and the student is what the table says."""
    shorter, count = re.subn(r"(train_count|val_count|batch_size): \d+", r"\1: 5", find_recipe(RECIPE).read_text())
    assert count == 3
    (tmp_path / "short.yaml").write_text(shorter)
    out = tmp_path / "out"
    rows = segmentation_demo(out, 1, 1, 1, Console(quiet=True), recipe=str(tmp_path / "short.yaml"))
    assert [row.method for row in rows] == list(METHODS)
    assert {row.seeds for row in rows} == {(0,)}
    table = (out / "classes.md").read_text()
    assert table.startswith(f"| class | {' | '.join(METHODS)} |")
    assert "| background |" in table
    assert table == class_table_of(out, METHODS, 1)
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 800
    recorded = json.loads((out / RECOMMENDED / "seed-0" / "result.json").read_text())["last"]["miou"]
    assert evaluate(str(out / "student.safetensors"), progress=False)["miou"] == pytest.approx(recorded, abs=1e-6)
    assert 100 * recorded == pytest.approx(next(row.last for row in rows if row.method == RECOMMENDED))


def test_the_packaged_teacher_does_as_well_as_its_card_says():
    weights = find_weights(TEACHER_WEIGHTS)
    assert weights.stat().st_size < 4_000_000
    assert read_card(weights)["metrics"]["miou"] > 0.7
    few = SegmentationScenes(**(read_card(weights)["data"]["init_args"] | {"train_count": 2, "val_count": 48}))
    assert evaluate(str(weights), data=few, progress=False)["miou"] > 0.65


def test_classes_that_a_run_does_not_have_do_not_count():
    rows = {"a": [{"iou/x": 0.5, "miou": 0.1}, {"iou/x": 0.25, "iou/y": 1.0}], "b": [{"iou/x": 0.125}]}
    assert class_table(rows).splitlines()[2:] == ["| x | 37.5 ± 17.7 | 12.5 |", "| y | 100.0 | - |"]
    assert class_table({"a": [{"top1": 0.5}]}) == ""
