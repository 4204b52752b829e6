"""Time a whole training step of a segmenter alone, and with KD, CWD, DIST and DiffKD on class maps.

uv run python -m benchmarks.segmentation --case short
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.at_least_one import at_least_one
from benchmarks.memory import peak_bytes
from benchmarks.report import RESULTS, machine, save, table, with_quartiles
from benchmarks.timing import ratios, spread, take_turns, usual_clock
from diffkd import CWD, DIST, KD, DiffKD, Distiller
from diffkd.models import load_segmenter
from diffkd.tasks.segmentation import Segmentation

METHODS = {"alone": None, "kd": KD, "cwd": CWD, "dist": DIST, "diffkd": DiffKD}


@dataclass(frozen=True)
class Case:
    """Two segmenters by name, and the batches they are given.

    Args:
        student: as for :func:`diffkd.models.segmenters.load`.
        teacher: likewise.
        classes: K.
        batch: images in a batch.
        size: (H, W) in pixels.
    """

    student: str
    teacher: str
    classes: int
    batch: int
    size: tuple[int, int]


CASES = {
    "short": Case("smp/pspnet/timm/mobilenetv3_small_050", "smp/pspnet/timm/test_resnet", 11, 8, (96, 120)),
    "deeplab": Case("smp/DeepLabV3/resnet18", "smp/DeepLabV3/resnet50", 19, 2, (128, 256)),
    "paper": Case("smp/DeepLabV3/resnet18", "smp/DeepLabV3/resnet101", 19, 4, (512, 1024)),
}


def make_step(case: Case, method: str, device: str) -> Callable[[], None]:
    """Return a whole training step: both forwards, all losses, backward and SGD."""
    torch.manual_seed(0)
    height, width = case.size
    images = torch.randn(case.batch, 3, height, width, device=device)
    masks = torch.randint(0, case.classes, (case.batch, height, width), device=device)
    student = load_segmenter(case.student, num_classes=case.classes).to(device)
    trained: nn.Module = student
    if (factory := METHODS[method]) is not None:
        teacher = load_segmenter(case.teacher, num_classes=case.classes).to(device)
        trained = Distiller(student, teacher, example=images[:2], method=factory)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3, momentum=0.9)
    task = Segmentation(tuple(map(str, range(case.classes))))
    ready = task.step((images, masks, torch.arange(case.batch)), 0)

    def step() -> None:
        output, losses = trained(ready.inputs) if trained is not student else (student(ready.inputs), {})
        optimizer.zero_grad()
        torch.stack([*task.losses(output, ready).values(), *losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def measure(case: Case, methods: Sequence[str], rounds: int, device: str) -> dict[str, Any]:
    """Return by method: "milliseconds", "over_alone" and "over_cwd" (median, quartiles, n), and "peak_bytes"."""
    peaks = {name: peak_bytes(partial(make_step, case, name, device), device) for name in methods}
    steps = {name: make_step(case, name, device) for name in methods}
    times = take_turns(steps, rounds, device=device, clock=usual_clock(device))
    over = {base: ratios(times, base) for base in ("alone", "cwd") if base in methods}
    return {
        name: {
            "milliseconds": asdict(spread([1e3 * seconds for seconds in times[name]])),
            **{f"over_{base}": asdict(found[name]) for base, found in over.items()},
            "peak_bytes": peaks[name],
        }
        for name in methods
    }


def describe(measured: dict[str, Any]) -> str:
    """Return the table of one case: medians and quartiles."""
    bases = [base for base in ("alone", "cwd") if base in measured]
    rows = [["step", "ms", *(f"over {base}" for base in bases), "peak MB"]]
    for name, facts in measured.items():
        cells = [
            with_quartiles(facts["milliseconds"], 0),
            *(with_quartiles(facts[f"over_{base}"], 2) for base in bases),
        ]
        rows.append([name, *cells, f"{facts['peak_bytes'] / 1e6:.0f}"])
    return table(rows)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write segmentation.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.segmentation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--case", nargs="+", default=["short"], choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=at_least_one, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(words)
    print(facts := machine(chosen.device))
    results = {}
    for name in chosen.case:
        results[name] = {"case": asdict(CASES[name])}
        results[name] |= {"steps": measure(CASES[name], chosen.methods, chosen.rounds, chosen.device)}
        print(f"\n{name}: {CASES[name]}, n = {chosen.rounds}\n{describe(results[name]['steps'])}")
    measuring = {"machine": facts, "rounds": chosen.rounds, "clock": usual_clock(chosen.device)}
    save(chosen.out, "segmentation", {**measuring, "cases": results})
    return results


if __name__ == "__main__":
    main()
