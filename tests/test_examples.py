import importlib.util
from pathlib import Path

import pytest
import torch

from diffkd.models import load_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_loop_learns_and_leaves_a_plain_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    accuracy = module.main(1, str(tmp_path / "student.safetensors"))
    assert accuracy > 0.3  # a tenth would be chance
    student = load_model(
        "cifar/compact_resnet8", num_classes=10, in_channels=1, weights=tmp_path / "student.safetensors"
    )
    assert student(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert "DiffKD" in capsys.readouterr().out
