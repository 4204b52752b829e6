"""The cost of a training step of each method, measured in alternation."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from diffkd.commands.arguments import fit_with
from diffkd.training.build import build_training
from diffkd.training.lightning_module import Training
from diffkd.training.options import FitOptions


@dataclass(frozen=True)
class StepCost:
    """Duration of a method's training step relative to the reference's, over rounds of one step per method.

    Attributes:
        median: median of the ratios.
        low: first quartile of the ratios.
        high: third quartile of the ratios.
        milliseconds: median duration of the step itself; on a CPU, the CPU time of all threads.
        rounds: number of rounds.
    """

    median: float
    low: float
    high: float
    milliseconds: float
    rounds: int


def step_costs(
    commands: Mapping[str, Sequence[str]], reference: str, *, rounds: int = 12, device: torch.device | None = None
) -> dict[str, StepCost]:
    """Time a whole training step (teacher, student, losses, backward, optimiser) of several methods.

    The methods alternate on the same batch, so that other load on the machine affects all of them equally; the first
    two rounds are not counted.

    Args:
        commands: for each method, the words of its `diffkd fit`.
        reference: method that the others are compared with.
        rounds: number of counted rounds.
        device: device to use; None: the first GPU, or the CPU.

    Returns:
        The cost of each method.

    Raises:
        ValueError: if the reference is not among the methods or there are no rounds.
    """
    if reference not in commands or rounds < 1:
        raise ValueError(f"{reference!r} must be one of {', '.join(commands)}, and rounds at least 1, got {rounds}")
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On a CPU, the CPU time of this process, which other processes disturb least.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    steps = {method: _stepper(words, device) for method, words in commands.items()}
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for round_ in range(rounds + 2):
        for method, step in steps.items():
            _wait(device)
            started = clock()
            step()
            _wait(device)
            if round_ >= 2:
                seconds[method].append(clock() - started)
    costs = {}
    for method, taken in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(taken, seconds[reference], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        costs[method] = StepCost(median, low, high, 1000 * statistics.median(taken), rounds)
    return costs


def training_of(words: Sequence[str]) -> tuple[Training, LightningDataModule]:
    """Return the training module and the data for the words of a `diffkd fit`."""

    def build(data: LightningDataModule, config: Any, **values: Any) -> tuple[Training, LightningDataModule]:
        return build_training(FitOptions(**values), data), data

    made: tuple[Training, LightningDataModule] = fit_with(list(words), use=build)
    return made


def _stepper(words: Sequence[str], device: torch.device) -> Callable[[], None]:
    """Return a function that takes one training step of the run that `words` describe."""
    torch.manual_seed(0)
    training, data = training_of(words)
    data.setup("fit")  # where data of Lightning make their sets
    training.to(device).train()
    optimizer = training.configure_optimizers()
    batch = training.transfer_batch_to_device(next(iter(data.train_dataloader())), device, 0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        terms = training.terms(training.task.step(batch, 0))
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
