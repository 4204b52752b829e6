"""Times of steps that take turns, so that whatever disturbs the machine disturbs all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of n values."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spread(values: list[float]) -> Spread:
    """Return median and quartiles.

    >>> print(spread([1.0, 2.0, 3.0, 4.0, 5.0]))
    3.00 [2.00, 4.00]
    """
    if len(values) < 2:
        return Spread(values[0], values[0], values[0], len(values))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high, len(values))


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 3,
    device: str = "cpu",
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Run every step once per round, in turns, and return its times in seconds.

    The order is reversed every other round, so that none always follows the same one. By the clock "cpu", which is
    this process's own, the time that others take on a busy machine is left out; their use of caches and memory is not.
    """
    for step in steps.values():
        for _ in range(warm_up):
            step()
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps) if turn % 2 == 0 else reversed(list(steps)):
            _wait(device)
            start = now()
            steps[name]()
            _wait(device)
            times[name].append(now() - start)
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, Spread]:
    """Return each one's time over the base's of the same round."""
    return {
        name: spread([ours / theirs for ours, theirs in zip(values, times[base], strict=True)])
        for name, values in times.items()
    }


def usual_clock(device: str) -> str:
    """Return the clock for steps that run in this process: its own on a CPU, the wall's on a GPU."""
    return "cpu" if device == "cpu" else "wall"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
