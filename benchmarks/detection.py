"""Time a detector's training step alone, with FitNet, with FGD and with DiffKD on every level of its pyramid.

uv run python -m benchmarks.detection --case short
uv run python -m benchmarks.detection --case paper --rounds 3
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.at_least_one import at_least_one
from benchmarks.memory import peak_bytes
from benchmarks.report import RESULTS, machine, save, table
from benchmarks.timing import ratios, spread, take_turns, usual_clock
from diffkd import FGD, DiffKD, FitNet
from diffkd.methods import MethodFactory
from diffkd.methods.box_kd import BoxKD
from diffkd.methods.shared import Shared
from diffkd.models import load_detector
from diffkd.tasks.data_facts import DataFacts
from diffkd.training.models import build_distiller

METHODS: dict[str, list[MethodFactory]] = {
    "alone": [],
    "fitnet": [partial(FitNet, weight=5.0), BoxKD],
    "fgd": [FGD],
    "diffkd": [partial(DiffKD, kd_weight=5.0), BoxKD],
    "diffkd-shared": [partial(Shared, method=partial(DiffKD, kd_weight=5.0)), BoxKD],
}


@dataclass(frozen=True)
class Case:
    """Two detectors, the channels of their pyramids, and what they see.

    Attributes:
        title: for tables.
        student, teacher: names of detectors.
        channels: of the pyramids.
        size: (H, W) in pixels.
        batch: images per step.
        classes: K.
    """

    title: str
    student: str
    teacher: str
    channels: int
    size: tuple[int, int]
    batch: int
    classes: int


CASES = {
    "short": Case(
        "FCOS, ResNet-18 -> test_resnet, 64 channels, 96 x 128 px, batch 4, as in bccd/short",
        *("fcos/timm/test_resnet", "fcos/resnet18", 64, (96, 128), 4, 3),
    ),
    "paper": Case(
        "RetinaNet, ResNet-101 -> ResNet-50, 256 channels, 256 x 320 px, batch 2",
        *("retinanet/resnet50", "retinanet/resnet101", 256, (256, 320), 2, 80),
    ),
}


def make_step(case: Case, method: str, device: str) -> tuple[Callable[[], None], int]:
    """Return a whole training step, and the number of parameters that train along and are thrown away."""
    torch.manual_seed(0)
    options = {"num_classes": case.classes, "fpn_channels": case.channels, "min_size": (min(case.size),)}
    student = load_detector(case.student, **options, max_size=max(case.size))  # type: ignore[arg-type]
    height, width = case.size
    images = [torch.rand(3, height, width, device=device) for _ in range(case.batch)]
    box = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.8], [0.2, 0.7, 0.3, 0.9]], device=device)
    scale = torch.tensor([width, height, width, height], device=device)
    labels = torch.ones(len(box), dtype=torch.int64, device=device)
    targets = [{"boxes": box * scale, "labels": labels} for _ in images]
    model: nn.Module = student
    if METHODS[method]:
        teacher = load_detector(case.teacher, **options, max_size=max(case.size))  # type: ignore[arg-type]
        facts = DataFacts(
            case.classes,
            3,
            case.size,
            (0.0,) * 3,
            (1.0,) * 3,
            tuple(str(index) for index in range(case.classes)),
            [image.cpu() for image in images[:2]],
            task="detection",
            min_size=(min(case.size),),
            max_size=max(case.size),
        )
        model = build_distiller(student, teacher, None, data=facts, pairs="auto", method=METHODS[method], seed=0)
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        output: dict[str, Tensor]
        losses: dict[str, Tensor] = {}
        if METHODS[method]:
            output, losses = model((images, targets))
        else:
            output = model(images, targets)
        optimizer.zero_grad(set_to_none=True)
        torch.stack([*output.values(), *losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    own = sum(p.numel() for p in student.parameters())
    return step, sum(p.numel() for p in model.parameters()) - own


def _step(case: Case, method: str, device: str) -> Callable[[], None]:
    return make_step(case, method, device)[0]


def measure(case: Case, methods: Sequence[str], rounds: int, device: str) -> dict[str, Any]:
    """Return by method the milliseconds of a step, its time over that of each other method, parameters and peak."""
    peaks = {method: peak_bytes(partial(_step, case, method, device), device) for method in methods}
    made = {method: make_step(case, method, device) for method in methods}
    steps = {name: step for name, (step, _) in made.items()}
    times = take_turns(steps, rounds, warm_up=1, device=device, clock=usual_clock(device))
    over = {base: ratios(times, base) for base in methods}
    return {
        name: {
            "milliseconds": asdict(spread([1e3 * seconds for seconds in values])),
            "over": {base: asdict(over[base][name]) for base in methods if base != name},
            "method_parameters": made[name][1],
            "peak_bytes": peaks[name],
        }
        for name, values in times.items()
    }


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the cases named on the command line, print tables and write detection-CASE.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=["short"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=at_least_one, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    results = {}
    for name in arguments.case:
        results[name] = found = measure(CASES[name], arguments.methods, arguments.rounds, arguments.device)
        bases = [base for base in ("alone", "fitnet") if base in found]
        rows = [("method", "ms a step", *(f"x {base}" for base in bases), "+ parameters", "peak MiB")]
        rows += [
            (
                method,
                f"{one['milliseconds']['median']:.0f}",
                *(f"{one['over'].get(base, {'median': 1})['median']:.2f}" for base in bases),
                f"{one['method_parameters']:,}",
                f"{one['peak_bytes'] / 2**20:.0f}",
            )
            for method, one in found.items()
        ]
        print(f"{CASES[name].title}, {arguments.device}\n\n{table(rows)}\n")
        measuring = {"clock": usual_clock(arguments.device), "machine": machine(arguments.device)}
        facts = {"case": CASES[name].title, **measuring, "methods": found}
        save(arguments.out, f"detection-{name}", facts)
    return results


if __name__ == "__main__":
    main()
