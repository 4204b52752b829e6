from pathlib import Path

import pytest
import torch
from torch import nn

from diffkd.models import load_model

CODE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Options:
    classes: int = 4

def build(num_classes=4, *, in_channels=3):
    return nn.Conv2d(in_channels, Options(num_classes).classes, 1)

def fixed():
    return nn.Linear(2, 2)

def anything(**options):
    model = nn.Identity()
    model.options = options
    return model

def nothing(): ...

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my-models.py"
    path.write_text(CODE)
    return path


def test_file(file: Path) -> None:
    model = load_model(f"{file}:build", num_classes=9, in_channels=2)
    assert model(torch.randn(1, 2, 4, 4)).shape == (1, 9, 4, 4)
    assert load_model(f"{file}:build").out_channels == 4
    assert load_model(f"{file}:fixed").in_features == 2
    assert load_model(f"{file}:fixed", num_classes=3, in_channels=1).in_features == 2  # takes neither, so has its own
    assert load_model(f"{file}:anything", num_classes=2, pretrained=True).options == {
        "num_classes": 2,
        "pretrained": True,
    }


def test_relative_file_in_a_folder_called_like_a_source(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "timm").mkdir()
    file.rename(file.parent / "timm" / "mine.py")
    monkeypatch.chdir(file.parent)
    assert isinstance(load_model("timm/mine.py:fixed"), nn.Linear)


def test_module() -> None:
    assert load_model("diffkd.models:resnet8", num_classes=3).fc.out_features == 3
    assert isinstance(load_model("torch.nn:Identity", num_classes=3), nn.Identity)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("{file}:biuld", {}, ValueError, "has no function 'biuld'; nearest: 'build'"),
        ("{file}:", {}, ValueError, "has no function ''"),
        ("{file}:build", {"pretrained": True}, ValueError, "takes no argument pretrained"),
        ("{file}:number", {}, TypeError, "'number' is a int"),
        ("{file}:nothing", {}, TypeError, "returned a NoneType; it must return an nn.Module"),
        ("{file}x.py:build", {}, FileNotFoundError, r"my-models\.pyx\.py"),
        ("no_such_package.models:build", {}, ValueError, "module 'no_such_package.models' cannot be found"),
        ("diffkd.no_such_module:build", {}, ValueError, "module 'diffkd.no_such_module' cannot be found"),
        ("../models:build", {}, ValueError, "cannot be found.*path/to/file.py:function"),
    ],
)
def test_refusals(file: Path, name: str, options: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        load_model(name.format(file=file), **options)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_errors_of_the_users_code_are_its_own(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_package_inside\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_inside"):
        load_model(f"{file}:build")
