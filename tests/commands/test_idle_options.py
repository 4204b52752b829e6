"""Options without effect, as they are typed after a recipe."""

import re
from pathlib import Path

import pytest

from diffkd.commands.arguments import values_of_fit
from diffkd.recipes.trust import UsageError

ALONE = "student: a\nout: b\ndata: {class_path: diffkd.data.FashionSubset}\nteacher_weights: unused\n"
TAUGHT = ALONE + "teacher: c\nmethod: diffkd.DiffKD\n"
PAIRS = "--pairs=[{student: output, method: diffkd.DIST}]"


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        (ALONE, ["--teacher_weights", "file"], "--teacher_weights has no effect without a teacher: give --teacher"),
        (ALONE, ["--teacher_cache=folder"], "--teacher_cache has no effect without a teacher"),
        (ALONE, ["--teacher_options.precision=bf16"], "--teacher_options has no effect without a teacher"),
        (ALONE, ["--method_weight=2"], "--method_weight has no effect without a teacher"),
        (TAUGHT, ["--teacher_cache_storage=float32"], "has no effect without a cache: give --teacher_cache FOLDER"),
        (TAUGHT, ["--method=diffkd.KD", PAIRS], "--method has no effect where all pairs name a method"),
        (TAUGHT, ["--method.kd_weight=2", PAIRS], "--method has no effect where all pairs name a method"),
        (ALONE, ["--schedule.milestones=[3]"], "has no effect on schedule.kind cosine: give --schedule.kind step"),
        (ALONE, ["--schedule.kind=step", "--schedule.milestones=[3]", "--schedule.every=2"], "--schedule.every has no"),
        (ALONE, ["--schedule.warmup_start=0.1"], "has no effect without warm-up"),
    ],
)
def test_an_option_without_effect_is_told(tmp_path: Path, recipe: str, words: list[str], message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(message)):
        values_of_fit([str(tmp_path / "recipe.yaml"), *words])


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (ALONE, []),
        (ALONE, ["--teacher_pretrained=false", "--teacher_weights=null"]),
        (TAUGHT, ["--teacher_weights=file", "--method=null", "--teacher=null"]),
        (TAUGHT, ["--teacher_weights=file", "--teacher_cache=folder", "--teacher_cache_storage=float32"]),
        (TAUGHT, ["--method=diffkd.KD", "--pairs=[{student: output, method: diffkd.DIST}, {student: '0'}]"]),
        (ALONE, ["--schedule.kind=step", "--schedule.milestones=[3]", "--schedule.factor=0.2"]),
    ],
)
def test_what_has_an_effect_or_only_stands_in_a_file_is_left_alone(
    tmp_path: Path, recipe: str, words: list[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert values_of_fit([str(tmp_path / "recipe.yaml"), *words])["student"] == "a"
