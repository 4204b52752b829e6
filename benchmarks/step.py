"""Time a whole training step of the student alone, KD, FitNet, DiffKD and a plain transcription of DiffKD.

uv run --group bench python -m benchmarks.step --case imagenet cifar
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.at_least_one import at_least_one
from benchmarks.cases import CASES, Case
from benchmarks.contestants import FEATURE_ALONE, ON_REQUEST, WITH_NETWORKS, Settings, Step, make_step
from benchmarks.counting import bytes_moved, kernel_launches, multiply_adds
from benchmarks.memory import peak_bytes
from benchmarks.report import RESULTS, machine, save, table, with_quartiles
from benchmarks.roofline import Rates, measured_rates
from benchmarks.timing import CLOCKS, ratios, spread, take_turns
from diffkd.training.memory import keep_freed_memory


def measure(
    case: Case, settings: Settings, contestants: Sequence[str], rounds: int, rates: Rates, clock: str = "wall"
) -> dict[str, Any]:
    """Measure the contestants of one case against each other.

    Returns:
        By contestant: "milliseconds" and, over each other one, "over" (median, quartiles, n); "parameters";
        "multiply_adds"; "bytes_moved"; "bound_milliseconds", the least time for both at the machine's `rates`;
        "peak_bytes"; "kernels" (None on a CPU).
    """
    eager = replace(settings, compile=None)
    counted: dict[str, dict[str, Any]] = {}
    for name in contestants:
        peak, run = measured_peak(case, name, eager), make_step(case, name, eager).run
        products, moved = multiply_adds(run), bytes_moved(run)
        counted[name] = {
            "peak_bytes": peak,
            "multiply_adds": products,
            "bytes_moved": moved,
            "bound_milliseconds": 1e3 * rates.seconds(products, moved),
        }
    steps: dict[str, Step] = {name: make_step(case, name, settings) for name in contestants}
    runs = {name: step.run for name, step in steps.items()}
    times = take_turns(runs, rounds, device=settings.device, clock=clock)
    over = {base: ratios(times, base) for base in contestants}
    return {
        name: {
            "milliseconds": asdict(spread([1e3 * seconds for seconds in times[name]])),
            "over": {base: asdict(over[base][name]) for base in contestants if base != name},
            "parameters": steps[name].parameters,
            "kernels": kernel_launches(steps[name].run) if settings.device == "cuda" else None,
            **counted[name],
        }
        for name in contestants
    }


def measured_peak(case: Case, contestant: str, settings: Settings) -> int:
    """Return the most bytes that a step takes, parameters, gradients and momentum included."""
    return peak_bytes(lambda: make_step(case, contestant, settings).run, settings.device)


def describe(measured: dict[str, Any]) -> str:
    """Return the table of one case."""
    bases = [base for base in ("kd" if "kd" in measured else "fitnet", "plain") if base in measured]
    head = ["contestant", "ms", *(f"over {base}" for base in bases)]
    head += ["G multiply-adds", "GB moved", "ms at best", "peak MB", "M parameters"]
    rows = [head]
    for name, facts in measured.items():
        cells = [name, with_quartiles(facts["milliseconds"], 1)]
        cells += ["1" if base == name else with_quartiles(facts["over"][base], 2) for base in bases]
        cells += [f"{facts['multiply_adds'] / 1e9:.2f}", f"{facts['bytes_moved'] / 1e9:.2f}"]
        cells += [f"{facts['bound_milliseconds']:.1f}", f"{facts['peak_bytes'] / 1e6:.0f}"]
        rows.append([*cells, f"{facts['parameters'] / 1e6:.2f}"])
    return table(rows)


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """Draw the steps' times of each case as bars, with quartiles."""
    figure = Figure(figsize=(4 * len(results), 3.5), layout="constrained")
    for axes, (name, measured) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for place, facts in enumerate(entry["milliseconds"] for entry in measured.values()):
            error = [[facts["median"] - facts["low"]], [facts["high"] - facts["median"]]]
            axes.bar(place, facts["median"], yerr=error, capsize=3)
        axes.set_xticks(range(len(measured)), list(measured))
        axes.set_title(name)
        axes.set_ylabel("ms per step")
    return figure


def main(words: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure, print, and write JSON and a picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="+", default=["imagenet", "cifar"], choices=list(CASES))
    usual = [name for name in WITH_NETWORKS if name not in ON_REQUEST]
    parser.add_argument("--contestants", nargs="+", default=usual, choices=WITH_NETWORKS)
    parser.add_argument("--batch", type=at_least_one, help="images per step, instead of the case's own")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16", "bf16-true"])
    parser.add_argument(
        "--compile", nargs="?", const="default", choices=["default", "reduce-overhead", "max-autotune"], help="and how"
    )
    parser.add_argument("--plain-networks", action="store_true", help="networks and optimiser of all alike")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=at_least_one, default=20)
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: of this process, for a busy machine"
    )
    parser.add_argument("--small", action="store_true", help="tiny batches: to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the files; by default from the options")
    chosen = parser.parse_args(words)
    settings = Settings(chosen.device, chosen.precision, chosen.compile, chosen.plain_networks)
    print(facts := machine(chosen.device))
    rates = measured_rates(chosen.device, torch.float32 if chosen.precision == "float32" else torch.bfloat16)
    results = {}
    for name in chosen.case:
        case = CASES[name].smaller() if chosen.small else CASES[name]
        case = case if chosen.batch is None else replace(case, batch=chosen.batch)
        known = WITH_NETWORKS if case.has_networks else FEATURE_ALONE
        contestants = [each for each in known if each in chosen.contestants]
        with keep_freed_memory():
            results[name] = measure(case, settings, contestants, chosen.rounds, rates, chosen.clock)
        print(f"\n{case.title}; batch {case.batch}, {chosen.precision}, n = {chosen.rounds}\n{describe(results[name])}")
    options = [word for word in ("compile", "plain_networks") if getattr(chosen, word)]
    file = chosen.name or "-".join(["step", chosen.device, chosen.precision, *options])
    record = {
        "machine": facts,
        "rates": asdict(rates),
        "settings": asdict(settings),
        "batch": chosen.batch,
        "rounds": chosen.rounds,
        "clock": chosen.clock,
        "small": chosen.small,
    }
    save(chosen.out, file, {**record, "cases": results}, draw(results))
    return results


if __name__ == "__main__":
    main()
