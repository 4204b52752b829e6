"""Write a run's detector into the package in half precision, its card with what it measures after that.

diffkd fit scenes/detection-teacher --out runs/scenes/detection-teacher
python scripts/pack_detector.py runs/scenes/detection-teacher src/diffkd/assets/scenes/detection-teacher.safetensors
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffkd.commands.evaluate import evaluate
from diffkd.export.student_file import find_student, read_card
from diffkd.files.weights import read_weights


def main(run: str, target: Path) -> None:
    """Halve the weights of `run`, write them to `target`, and measure them."""
    weights = {
        name: (value.half() if value.dtype == torch.float32 else value).contiguous()
        for name, value in read_weights(find_student(run)).items()
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, target, metadata={"format": "pt"})
    card = {**read_card(find_student(run)), "command": "diffkd fit scenes/detection-teacher", "stored": "float16"}
    beside = target.with_suffix(".json")
    beside.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card["metrics"] = evaluate(str(target), accelerator="cpu")
    beside.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
