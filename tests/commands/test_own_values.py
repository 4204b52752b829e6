"""Which values a method and an optimiser have that take another's place."""

from pathlib import Path
from typing import Any

import pytest

from diffkd.commands.arguments import values_of_fit

RECIPE = """
student: a
out: b
teacher: c
data: {class_path: diffkd.data.FashionSubset}
method: {class_path: diffkd.KD, init_args: {temperature: 9.0, weight: 3.0}}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.3, weight_decay: 0.2}}
"""


def values(tmp_path: Path, text: str, *words: str) -> dict[str, Any]:
    for name, content in (("recipe", RECIPE), ("preset", text)):
        (tmp_path / f"{name}.yaml").write_text(content, encoding="utf-8")
    found = values_of_fit([str(tmp_path / "recipe.yaml"), f"--config={tmp_path / 'preset.yaml'}", *words])
    if isinstance(found["method"], list):  # as which the parser takes one that is typed
        (found["method"],) = found["method"]
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: diffkd.AT\n", []),
        ("{}\n", ["--method=diffkd.AT"]),
        ("{}\n", ["--method", "AT"]),
        ("method: {class_path: diffkd.DiffKD}\n", ["--method=diffkd.AT"]),
        ("method: [diffkd.KD, diffkd.SP]\n", ["--method=[diffkd.AT]"]),
    ],
)
def test_another_method_does_not_take_over_values_of_the_same_name(tmp_path: Path, text: str, words: list[str]) -> None:
    method = values(tmp_path, text, *words)["method"]
    assert method["class_path"] == "diffkd.AT"
    assert method["init_args"]["weight"] == 1000  # its own default


@pytest.mark.parametrize(
    ("text", "words", "weight"),
    [
        ("method: {class_path: diffkd.KD, init_args: {temperature: 4.0}}\n", [], 3),
        ("{}\n", ["--method=diffkd.methods.KD", "--method.temperature=4"], 3),
        ("{}\n", ["--method.temperature=4", "--method.weight=5"], 5),
        ("method: {init_args: {temperature: 4.0}}\n", [], 3),
        ("method: diffkd.AT\n", ["--method=diffkd.KD", "--method.temperature=4"], 1),
    ],
)
def test_the_same_method_keeps_what_is_not_given_anew(
    tmp_path: Path, text: str, words: list[str], weight: float
) -> None:
    method = values(tmp_path, text, *words)["method"]
    assert method["class_path"] == "diffkd.KD"
    assert (method["init_args"]["temperature"], method["init_args"]["weight"]) == (4, weight)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer=torch.optim.AdamW"], (0.001, 0.01)),
        (["--optimizer", "AdamW", "--optimizer.lr", "0.02"], (0.02, 0.01)),
        (["--optimizer=torch.optim.SGD", "--optimizer.lr=0.02"], (0.02, 0.2)),
        (["--optimizer.lr=0.02"], (0.02, 0.2)),
    ],
)
def test_another_optimizer_does_not_take_over_the_rate(
    tmp_path: Path, words: list[str], expected: tuple[float, float]
) -> None:
    found = values(tmp_path, "{}\n", *words)["optimizer"]["init_args"]
    assert (found["lr"], found["weight_decay"]) == expected
