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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks.at_least_one import at_least_one
from benchmarks.cases import CASES
from benchmarks.contestants import Settings, make_step
from benchmarks.counting import bytes_moved, multiply_adds
from benchmarks.report import RESULTS, machine, save
from benchmarks.roofline import measured_rates
from diffkd import save_student
from diffkd.files.run_folder import RunFolder
from diffkd.training.checkpointing import read_checkpoint


def epoch_seconds(run: Path) -> list[float]:
    """Return how long each epoch of a finished run took, from its metrics.csv."""
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        ends = [float(row["seconds"]) for row in csv.DictReader(file)]
    return [end - start for start, end in zip([0.0, *ends], ends, strict=False)]


def random_teacher(name: str, classes: int, pixels: int) -> nn.Module:
    """Return a model by name with random weights and the statistics of noise, without which deep ones overflow."""
    from diffkd.models import load_model

    torch.manual_seed(0)
    teacher = load_model(name, num_classes=classes).train()
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for _ in range(4):
            teacher(torch.randn(32, 3, pixels, pixels))
    return teacher


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, print, and write JSON.

    Returns:
        "seconds_per_epoch", "images_per_second", and with a case its roofline: what the machine's rates of arithmetic
        and memory would allow.

    Raises:
        RuntimeError: if the training failed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="cifar100/resnet56-resnet20")
    parser.add_argument("--epochs", type=at_least_one, default=4)
    parser.add_argument(
        "--case", choices=list(CASES), help="of benchmarks.step that has the same step: for the roofline"
    )
    parser.add_argument("--random-teacher", help="model whose random weights teach, such as cifar/resnet56")
    parser.add_argument("--classes", type=at_least_one, default=100)
    parser.add_argument("--pixels", type=at_least_one, default=32, help="edge of the images that it sees")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the file; by default from the device")
    parser.add_argument("options", nargs="*", help="after --: further options of diffkd fit")
    chosen = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        options = list(chosen.options)
        if chosen.random_teacher:
            teacher = random_teacher(chosen.random_teacher, chosen.classes, chosen.pixels)
            options.append(f"--teacher_weights={save_student(teacher, Path(folder) / 'teacher.safetensors')}")
        run = Path(folder) / "run"
        _fit([chosen.recipe, f"--out={run}", f"--epochs={chosen.epochs}", *options])
        seconds = epoch_seconds(run)
        images = read_checkpoint(RunFolder(run).checkpoint)["diffkd"]["samples"]["training images"]
        half = "16" in yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["precision"]
    median = statistics.median(seconds[1:] or seconds)
    facts: dict[str, Any] = {
        "machine": machine(device),
        "recipe": chosen.recipe,
        "options": chosen.options,
        "epochs": seconds,
        "seconds_per_epoch": median,
        "images_per_second": images / median,
    }
    if chosen.case:
        case = CASES[chosen.case]
        step = make_step(case, "diffkd", Settings(device, "bf16" if half else "float32")).run
        rates = measured_rates(device, torch.bfloat16 if half else torch.float32)
        products, moved = multiply_adds(step), bytes_moved(step)
        at_best = case.batch / rates.seconds(products, moved)
        facts["roofline"] = {
            **asdict(rates),
            "multiply_adds_per_image": products / case.batch,
            "bytes_per_image": moved / case.batch,
            "images_per_second_at_best": at_best,
            "share": facts["images_per_second"] / at_best,
        }
        print(
            f"at best {at_best:.0f} images per second by operations and bytes: {facts['roofline']['share']:.0%} of it"
        )
    print(f"{median:.2f} s per epoch, {facts['images_per_second']:.0f} images per second, n = {len(seconds)} epochs")
    save(chosen.out, chosen.name or f"epoch-{device}", facts)
    return facts


def _fit(words: list[str]) -> None:
    from diffkd.commands.cli import main as diffkd

    if code := diffkd(["fit", *words]):
        raise RuntimeError(f"diffkd fit {' '.join(words)} ended with exit status {code}; its message is above")


if __name__ == "__main__":
    main()
