"""Time whole epochs of a recipe through `diffkd fit`: data, augmentation, evaluation and records included.

    uv run python -m benchmarks.epoch --epochs 4 -- --data.root DATA --teacher_weights TEACHER
    uv run python -m benchmarks.epoch --epochs 4 --random-teacher cifar/resnet56 -- --data.root DATA

The first epoch, which warms up, is left out of the median where there are more. How long a step takes does not depend
on what the teacher has learned, so that a random one does.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.contestants import Settings, make_step
from benchmarks.counting import multiply_adds
from benchmarks.report import RESULTS, machine, save
from diffkd import save_student


def epoch_seconds(run: Path) -> list[float]:
    """Return how long each epoch of a finished run took, from its metrics.csv."""
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        ends = [float(row["seconds"]) for row in csv.DictReader(file)]
    return [end - start for start, end in zip([0.0, *ends], ends, strict=False)]


def machine_peak(device: str, dtype: torch.dtype = torch.float32, size: int = 2048) -> dict[str, float]:
    """Measure the roofline: multiply-adds per second of a large matrix product, bytes per second of a copy."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    block = torch.empty(64 * size * size // 4, device=device, dtype=torch.int8)
    return {
        "multiply_adds_per_second": size**3 / _best(lambda: a @ a, device),
        "bytes_per_second": 2 * block.nbytes / _best(block.clone, device),
    }


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, print, and write JSON.

    Returns:
        "seconds_per_epoch", "images_per_second", and with a case the share of the machine's peak that its arithmetic
        comes to.

    Raises:
        RuntimeError: if the training failed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="cifar100/resnet56-resnet20")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=50_000, help="training images per epoch")
    parser.add_argument(
        "--case", choices=list(CASES), help="of benchmarks.step that has the same step: for the roofline"
    )
    parser.add_argument("--random-teacher", help="model whose random weights teach, such as cifar/resnet56")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("options", nargs="*", help="after --: further options of diffkd fit")
    chosen = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        options = list(chosen.options)
        if chosen.random_teacher:
            from diffkd.models import load_model

            teacher = load_model(chosen.random_teacher, num_classes=chosen.classes)
            options.append(f"--teacher_weights={save_student(teacher, Path(folder) / 'teacher.safetensors')}")
        run = Path(folder) / "run"
        _fit([chosen.recipe, f"--out={run}", f"--epochs={chosen.epochs}", *options])
        seconds = epoch_seconds(run)
    median = statistics.median(seconds[1:] or seconds)
    facts: dict[str, Any] = {
        "machine": machine(device),
        "recipe": chosen.recipe,
        "options": chosen.options,
        "epochs": seconds,
        "seconds_per_epoch": median,
        "images_per_second": chosen.images / median,
    }
    if chosen.case:
        case = CASES[chosen.case]
        per_image = multiply_adds(make_step(case, "diffkd", Settings(device)).run) / case.batch
        peak = machine_peak(device)
        facts["roofline"] = {
            **peak,
            "multiply_adds_per_image": per_image,
            "share_of_peak": per_image * facts["images_per_second"] / peak["multiply_adds_per_second"],
        }
    print(f"{median:.2f} s per epoch, {facts['images_per_second']:.0f} images per second, n = {len(seconds)} epochs")
    save(chosen.out, f"epoch-{device}", facts)
    return facts


def _fit(words: list[str]) -> None:
    from diffkd.cli import main as diffkd

    if code := diffkd(["fit", *words]):
        raise RuntimeError(f"diffkd fit {' '.join(words)} ended with exit status {code}; its message is above")


def _best(run: Callable[[], object], device: str, times: int = 5) -> float:
    best = float("inf")
    for _ in range(times):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
