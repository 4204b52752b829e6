"""Which options of DiffKD help: a factorial design, measured on a held-out part of the training data.

    uv run python -m benchmarks.better --seeds 3 --jobs 2 --runs 16 --out better -- --epochs 7

Every run of the design is a training of `--recipe` with the preset `--method`, some of its options at their other
level. One line of JSON each goes to OUT/runs.jsonl; called again, what is there is not trained again. The table has the
main effect of each option: the mean score with it less the mean without it, over all other options, with its standard
error and p-value from how differently the seeds rank the settings. With fewer runs than combinations the design is a
fraction of them in which the columns of the options stay orthogonal, and effects of one option share theirs with
interactions of others.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import stats

from benchmarks.report import table as markdown
from diffkd.commands.arguments import fit_with, values_of_fit
from diffkd.commands.compare import find_method
from diffkd.commands.tune import with_values
from diffkd.data import hold_out
from diffkd.recipes import find_recipe
from diffkd.recipes.trust import named_code, take_trust
from diffkd.training.fit import fit

# Each option with its low and its high level: values of the recipe by their dotted names, for presets that have DiffKD
# first and a loss on the raw outputs second.
_DIFFKD = "method.0.init_args"
FACTORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "direct": (
        {f"{_DIFFKD}.features_only": False, "method.1.init_args.weight": 0.0},
        {f"{_DIFFKD}.features_only": True, "method.1.init_args.weight": 1.0},
    ),
    "standardised": ({f"{_DIFFKD}.standardize": False}, {f"{_DIFFKD}.standardize": True}),
    "film": ({f"{_DIFFKD}.time": "embedding"}, {f"{_DIFFKD}.time": "film"}),
    "clean": ({f"{_DIFFKD}.prediction": "noise"}, {f"{_DIFFKD}.prediction": "clean"}),
    "every_step": ({f"{_DIFFKD}.every_step": False}, {f"{_DIFFKD}.every_step": True}),
    "one_step": ({f"{_DIFFKD}.inference_steps": 5}, {f"{_DIFFKD}.inference_steps": 1}),
    "start_500": ({f"{_DIFFKD}.start_timestep": -1}, {f"{_DIFFKD}.start_timestep": 500}),
    "balance": ({"balance": None}, {"balance": {"balance": 4.0}}),
}
DEFAULT_FACTORS = tuple(name for name in FACTORS if name != "direct")  # a detector's boxes are never diffused
Levels = tuple[bool, ...]
BASE = "benchmarks/beds/noise-logits.yaml"
START_METHOD = "spawn"  # of the processes of trainings


def design(factors: int, runs: int) -> list[Levels]:
    """Return two-level settings of so many factors, orthogonal: any two factors have all four combinations alike.

    The first log2(runs) columns are a full factorial; each further one is the sum modulo 2 of several of those, of as
    many as possible, so that main effects share their columns with high interactions.

    Raises:
        ValueError: if `runs` is no power of two, or too few for the factors.

    >>> design(3, 4)
    [(False, False, False), (False, True, True), (True, False, True), (True, True, False)]
    """
    base = min(runs.bit_length() - 1, factors)
    if runs < 2 or runs & (runs - 1) or 2**base - 1 < factors:
        raise ValueError(f"{runs} runs do not fit {factors} factors: give a power of two above the factors")
    sums = [subset for size in range(base, 1, -1) for subset in itertools.combinations(range(base), size)]
    return [
        (*row, *(bool(sum(row[i] for i in subset) % 2) for subset in sums[: factors - base]))
        for row in itertools.product((False, True), repeat=base)
    ]


@dataclass(frozen=True)
class Effect:
    """How much better a setting is with an option than without, over all others.

    Attributes:
        name: of the option.
        mean: of the score with it less the score without it.
        error: standard error of `mean`; None for one seed.
        p: two-sided p-value of "no effect", Student's t; None for one seed, or if no two seeds differ.
    """

    name: str
    mean: float
    error: float | None
    p: float | None


def main_effects(scores: Mapping[tuple[Levels, int], float], names: Sequence[str]) -> list[Effect]:
    """Return the main effects of the options.

    The noise is what remains of m settings x n seeds beside a mean of each setting and of each seed: it has
    (m - 1)(n - 1) degrees of freedom, and an effect, the difference of two halves of all runs, the standard error
    2 s / sqrt(m n) (Montgomery, Design and Analysis of Experiments: a 2^k design, replicated in blocks).

    Args:
        scores: by levels and seed; seeds that lack a run of the others' are left out.
        names: of the options.

    Raises:
        ValueError: if no seed has a run of every setting.
    """
    settings = sorted({levels for levels, _ in scores})
    seeds = [seed for seed in sorted({seed for _, seed in scores}) if all((one, seed) in scores for one in settings)]
    if not seeds:
        raise ValueError(f"no seed has a run of each of the {len(settings)} settings")
    table = np.array([[scores[one, seed] for seed in seeds] for one in settings])
    signs = np.where(settings, 1.0, -1.0)
    means = 2.0 * signs.T @ table.mean(axis=1) / len(settings)
    freedom = (len(settings) - 1) * (len(seeds) - 1)
    if not freedom:
        return [Effect(name, float(mean), None, None) for name, mean in zip(names, means, strict=True)]
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    error = 2.0 * math.sqrt((rest**2).sum() / freedom / table.size)
    return [
        Effect(name, float(mean), error, float(2 * stats.t.sf(abs(mean) / error, freedom)) if error else None)
        for name, mean in zip(names, means, strict=True)
    ]


def measure(words: Sequence[str], names: Sequence[str], levels: Levels, seed: int, share: float, folder: str) -> float:
    """Train with the options at their levels, and return the last epoch's score on held-out training images."""
    torch.set_num_threads(1)
    values = values_of_fit([*words, f"--out={folder}", f"--seed={seed}"])
    chosen: dict[str, Any] = {}
    for name, is_high in zip(names, levels, strict=True):
        chosen |= FACTORS[name][is_high]
    recipe = Path(folder).with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(with_values(values, chosen)), encoding="utf-8")

    def run(**arguments: Any) -> Any:
        config = {**(arguments.pop("config", None) or {}), "held_out": share}
        return fit(data=hold_out(arguments.pop("data"), share), config=config, **arguments)

    trusted = [f"--trust={name}" for name in [*take_trust(words)[1], *named_code(words)]]
    result = fit_with([str(recipe), "--resume=true", "--progress=false", *trusted], use=run)
    return float(result["last"][result["score"]])


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing of the design, and print the main effects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--method", default=BASE, help="preset: DiffKD, then a loss on the raw outputs")
    parser.add_argument("--factors", nargs="+", default=list(DEFAULT_FACTORS), choices=list(FACTORS))
    parser.add_argument("--runs", type=int, default=16, help="settings of the design, a power of two")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.2, help="of the training data, to measure on")
    parser.add_argument("--out", type=Path, default=Path("better"))
    parser.add_argument("options", nargs="*", help="after --: options of `diffkd fit` for all runs")
    given = parser.parse_args(argv)
    words = [str(find_recipe(given.recipe)), f"--config={find_method(given.method)}", *given.options]
    file = given.out / "runs.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    common = {"words": words[2:], "recipe": given.recipe, "method": given.method, "share": given.share}
    known = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be broken off
    settings = design(len(given.factors), given.runs)

    def is_high(one: Mapping[str, Any]) -> Levels:
        return tuple(bool(one["levels"][name]) for name in given.factors)

    scores = {
        (is_high(one), int(one["seed"])): float(one["score"])
        for one in known
        if set(one["levels"]) == set(given.factors) and {name: one[name] for name in common} == common
    }
    # Seed by seed, so that an interrupted one has whole seeds.
    missing = [(one, seed) for seed in range(given.seeds) for one in settings if (one, seed) not in scores]
    given.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context(START_METHOD)) as pool:
        futures = {}
        for levels, seed in missing:
            name = "".join(str(int(level)) for level in levels)
            folder = str(given.out / f"{'-'.join(given.factors)}-{name}" / f"seed-{seed}")
            futures[pool.submit(measure, words, given.factors, levels, seed, given.share, folder)] = (levels, seed)
        for future in as_completed(futures):
            levels, seed = futures[future]
            scores[levels, seed] = score = future.result()
            line = {**common, "levels": dict(zip(given.factors, levels, strict=True)), "seed": seed, "score": score}
            with file.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print(f"{len(scores)}/{len(settings) * given.seeds}  {line['levels']} seed {seed}: {100 * score:.2f} %")
    wanted = {key: score for key, score in scores.items() if key[0] in settings and key[1] < given.seeds}
    mean = statistics.mean(wanted.values())
    print(f"\n{len(wanted)} runs, mean {100 * mean:.2f} %, on {given.share:.0%} of the training images, held out\n")
    rows = [["option", "effect (points)", "p"]]
    for one in main_effects(wanted, given.factors):
        error = "" if one.error is None else f" ± {100 * one.error:.2f}"
        rows.append([one.name, f"{100 * one.mean:+.2f}{error}", "-" if one.p is None else f"{one.p:.2g}"])
    print(markdown(rows))


if __name__ == "__main__":
    main()
