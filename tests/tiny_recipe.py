"""A recipe that trains in a second, with its images."""

from pathlib import Path

import numpy as np

MODELS = Path(__file__).parent / "tiny_models.py"
TRUST = f"--trust={MODELS}"


def write_recipe(folder: Path, epochs: int = 2) -> Path:
    """Write 40 random images of four classes for training and 40 for evaluation, and DiffKD of `small` on them."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        images = generator.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
        np.savez(folder / f"{split}.npz", images=images, labels=np.arange(40) % 4)
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
student: {MODELS}:small
teacher: {MODELS}:large
method: diffkd.DiffKD
data:
  class_path: diffkd.data.Arrays
  init_args: {{train: {folder}/train.npz, test: {folder}/test.npz, batch_size: 10}}
epochs: {epochs}
""",
        encoding="utf-8",
    )
    return path
