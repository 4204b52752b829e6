"""Write a run's student into the package as a teacher, in half precision; its card says what it measures after that.

diffkd fit scenes/detection-teacher --out runs/scenes/detection-teacher
python scripts/pack_teacher.py scenes/detection-teacher runs/scenes/detection-teacher \
    src/diffkd/assets/scenes/detection-teacher.safetensors
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffkd.commands.evaluate import evaluate
from diffkd.export.student_file import find_student, read_card
from diffkd.files.weights import read_weights


def main(recipe: str, run: str, target: Path) -> None:
    """Halve the weights of `run`, which `recipe` has trained, write them to `target`, and measure them."""
    weights = {
        name: (value.half() if value.dtype == torch.float32 else value).contiguous()
        for name, value in read_weights(find_student(run)).items()
    }
    if bad := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise SystemExit(f"{run}: {bad[0]} does not fit into float16: train it anew, or store it in full precision")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, target, metadata={"format": "pt"})
    card = {**read_card(find_student(run)), "command": f"diffkd fit {recipe}", "stored": "float16"}
    beside = target.with_suffix(".json")
    beside.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card["metrics"] = evaluate(str(target), accelerator="cpu")
    beside.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
