"""How the cost of DiffKD on one feature grows with steps, autoencoder, batch, image size and number of pairs.

    uv run --group bench python -m benchmarks.growth

The base is the last map of a ResNet-18 at 224 pixels, 512 x 7 x 7, with an autoencoder of 512 channels; one thing is
varied at a time. Networks are left out: what they cost does not depend on any of it but batch and size.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.at_least_one import at_least_one
from benchmarks.cases import Case
from benchmarks.contestants import FEATURE_ALONE, Settings, make_step
from benchmarks.counting import multiply_adds
from benchmarks.report import RESULTS, machine, save, table
from benchmarks.step import measured_peak
from benchmarks.timing import CLOCKS, spread, take_turns

BASE = Case("512 x 7 x 7, batch 4, AE 512", 4, (7, 7), channels=512, ae_channels=512)

GROWTH: dict[str, dict[int, Case]] = {
    "denoising steps": {n: replace(BASE, steps=n) for n in (1, 2, 3, 5, 10, 20)},
    "autoencoder width": {n: replace(BASE, ae_channels=n) for n in (128, 256, 512, 1024, 2048)},
    "batch": {n: replace(BASE, batch=n) for n in (1, 2, 4, 8, 16)},
    "image size": {n: replace(BASE, size=(n // 32, n // 32)) for n in (64, 128, 224, 320, 448)},
    "pairs": {n: replace(BASE, pairs=n) for n in (1, 2, 4)},
}


def measure(
    case: Case, settings: Settings, contestants: Sequence[str], rounds: int, clock: str = "wall"
) -> dict[str, dict[str, Any]]:
    """Return milliseconds (median, quartiles, n), multiply-adds and peak bytes by contestant."""
    steps = {name: make_step(case, name, settings) for name in contestants}
    times = take_turns(
        {name: step.run for name, step in steps.items()}, rounds, warm_up=1, device=settings.device, clock=clock
    )
    return {
        name: {
            "milliseconds": asdict(spread([1e3 * seconds for seconds in times[name]])),
            "multiply_adds": multiply_adds(step.run),
            "peak_bytes": measured_peak(case, name, settings),
        }
        for name, step in steps.items()
    }


def draw(results: dict[str, dict[int, dict[str, dict[str, Any]]]]) -> Figure:
    """Draw time above and peak memory below, against each thing that was varied."""
    figure = Figure(figsize=(3 * len(results), 5.5), layout="constrained")
    panels = figure.subplots(2, len(results), squeeze=False)
    for column, (what, points) in enumerate(results.items()):
        for name in next(iter(points.values())):
            times = [point[name]["milliseconds"]["median"] for point in points.values()]
            memory = [point[name]["peak_bytes"] / 1e6 for point in points.values()]
            panels[0, column].plot(list(points), times, marker=".", label=name)
            panels[1, column].plot(list(points), memory, marker=".", label=name)
        panels[1, column].set_xlabel(what)
        for row in (0, 1):
            panels[row, column].set_ylim(bottom=0)
    panels[0, 0].set_ylabel("ms per step")
    panels[1, 0].set_ylabel("peak MB")
    panels[0, 0].legend()
    return figure


def main(words: Sequence[str] | None = None) -> dict[str, dict[int, dict[str, dict[str, Any]]]]:
    """Measure, print, and write JSON and a picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vary", nargs="+", default=list(GROWTH), choices=list(GROWTH))
    parser.add_argument("--contestants", nargs="+", default=["diffkd", "checkpointed", "plain"], choices=FEATURE_ALONE)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16", "bf16-true"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=at_least_one, default=9)
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: of this process, for a busy machine"
    )
    parser.add_argument("--small", action="store_true", help="tiny features: to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(words)
    settings = Settings(chosen.device, chosen.precision)
    results: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for what in chosen.vary:
        results[what] = {}
        for value, case in GROWTH[what].items():
            sized = replace(case, channels=8, ae_channels=8, batch=2, size=(2, 2)) if chosen.small else case
            results[what][value] = measure(sized, settings, chosen.contestants, chosen.rounds, chosen.clock)
        names = list(next(iter(results[what].values())))
        heads = [head for name in names for head in (f"{name}, ms", "G multiply-adds", "peak MB")]
        rows = [[what, *heads]]
        for value, point in results[what].items():
            cells = [
                cell
                for name in names
                for cell in (
                    f"{point[name]['milliseconds']['median']:.1f}",
                    f"{point[name]['multiply_adds'] / 1e9:.2f}",
                    f"{point[name]['peak_bytes'] / 1e6:.0f}",
                )
            ]
            rows.append([str(value), *cells])
        print(f"\n{table(rows)}")
    record = {
        "machine": machine(chosen.device),
        "settings": asdict(settings),
        "rounds": chosen.rounds,
        "clock": chosen.clock,
    }
    save(chosen.out, f"growth-{chosen.device}-{chosen.precision}", {**record, "growth": results}, draw(results))
    return results


if __name__ == "__main__":
    main()
