"""How hard the losses of a method pull at the student, beside the cross entropy: norms of gradients while it learns.

    uv run python -m benchmarks.gradients --recipe cifar100/short --methods kd dist diffkd -- --data.root DATA

A loss of which the gradient is a hundredth of the task's teaches nothing in a short training, and one of a hundred
times drowns the labels; the weights of published methods differ by as much as that.
"""

import argparse
from collections.abc import Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.at_least_one import at_least_one
from benchmarks.report import RESULTS, machine, save, table
from diffkd.commands.compare import find_method
from diffkd.commands.step_cost import training_of
from diffkd.tasks.task import TASK


def pulls(words: Sequence[str], at: Sequence[int]) -> dict[int, float]:
    """Train a student as `words` of `diffkd fit` say, without its schedule, and look at its gradients at some steps.

    Returns:
        By step, counted from 1: the norm of the gradient of the method's losses in the student's parameters over that
        of the task's losses, both weighted.

    Raises:
        ValueError: if no method teaches the student.
    """
    training, data = training_of(words)
    if training.distiller is None:
        raise ValueError(f"no method teaches the student of diffkd fit {' '.join(words)}")
    training.train()
    optimizer, student = training.configure_optimizers(), list(training.student.parameters())
    loader = data.train_dataloader()
    torch.manual_seed(0)
    found = {}
    for number, batch in enumerate(islice(chain.from_iterable(repeat(loader)), max(at)), start=1):
        step = training.task.step(batch, number)
        terms = training.terms(step)
        if number in at:
            own = [terms[name] for name in terms if name.split("/")[0] == TASK]
            taught = [terms[name] for name in terms if name.split("/")[0] != TASK]
            found[number] = _norm(taught, student) / _norm(own, student)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return found


def _norm(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> float:
    gradients = torch.autograd.grad(torch.stack(list(losses)).sum(), parameters, retain_graph=True, allow_unused=True)
    return float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients if g is not None])))


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write JSON: by method and step the ratio of each seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradients", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--methods", nargs="+", required=True, help="as for diffkd compare")
    parser.add_argument("--steps", nargs="+", type=at_least_one, default=[1, 60])
    parser.add_argument("--seeds", type=at_least_one, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("options", nargs="*", help="after --: further options of diffkd fit")
    chosen = parser.parse_args(words)
    ratios: dict[str, dict[int, list[float]]] = {}
    for method in chosen.methods:
        each = [
            pulls(
                [
                    chosen.recipe,
                    f"--config={find_method(method, chosen.recipe)}",
                    "--out=unused",
                    f"--seed={seed}",
                    *chosen.options,
                ],
                chosen.steps,
            )
            for seed in range(chosen.seeds)
        ]
        ratios[Path(method).stem] = {step: [one[step] for one in each] for step in chosen.steps}
    rows = [["step", *ratios]]
    for step in chosen.steps:
        rows.append([str(step), *(_range(found[step]) for found in ratios.values())])
    print(table(rows))
    facts = {"machine": machine("cpu"), "recipe": chosen.recipe, "options": chosen.options, "ratios": ratios}
    save(chosen.out, "gradients", facts)
    return facts


def _range(values: Sequence[float]) -> str:
    """Return the smallest and the largest, to two digits.

    >>> _range([123.4, 0.0567])
    '0.057 to 120'
    """
    low, high = (f"{float(f'{value:.2g}'):g}" for value in (min(values), max(values)))
    return f"{low} to {high}"


if __name__ == "__main__":
    main()
