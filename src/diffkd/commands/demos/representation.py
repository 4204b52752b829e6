"""`diffkd demo --task representation`: distil without labels, then fine-tune on few of them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffkd.commands.compare import Run, compare, cores, train_all
from diffkd.commands.evaluate import data_of
from diffkd.export.student_file import read_card
from diffkd.files.weights import write_text
from diffkd.models import load_backbone
from diffkd.recipes import find_recipe
from diffkd.reports.tables import Row
from diffkd.tasks.representation import Representation

RECIPE, FINE_TUNING = "representation/demo", "finetune/demo"
METHODS = ("cosine", "representation/fitnet-direct", "representation/diffkd-direct")
# Labelled images of each class, of 800, the epochs and the batch size of their training.
LABELS = {8: (40, 16), 80: (20, 64)}
SCRATCH = "random"


def representation_demo(
    out: Path,
    seeds: int,
    epochs: int,
    jobs: int | None,
    console: Console,
    *,
    methods: Sequence[str] = METHODS,
    labels: Mapping[int, tuple[int, int]] = LABELS,
    options: Sequence[str] = (),
) -> list[Row]:
    """Distil the packaged teacher without labels by several methods, then fine-tune on 1 % and 10 % of the labels.

    Images and teacher come with the package: nothing is downloaded. If interrupted and called again, it continues.

    Args:
        out: folder for the tables and all runs.
        seeds: runs of each method.
        epochs: length of each run without labels.
        jobs: runs at the same time; None: one per core.
        console: console for progress messages.
        methods: presets of the package.
        labels: by labelled images of each class, epochs and batch size of the fine-tuning.
        options: further options of `diffkd fit` for all runs.

    Returns:
        A row per method of the training without labels.
    """
    jobs = cores() if jobs is None else jobs
    names = [Path(method).name for method in methods]
    console.print(f"representation: {len(names)} methods without labels, {seeds} seed(s) each, in {out}")
    pretraining = [f"--epochs={epochs}", *options]
    rows = compare(
        RECIPE, out / "pretrained", methods=list(methods), seeds=seeds, jobs=jobs, cost=False, options=pretraining
    )
    commands: dict[Run, list[str]] = {}
    for count, (length, batch) in labels.items():
        for seed in range(seeds):
            for name in (SCRATCH, *names):
                run = Run(name, seed, out / f"labels-{count}" / name / f"seed-{seed}")
                start = out / "pretrained" / name / f"seed-{seed}"
                commands[run] = [
                    str(find_recipe(FINE_TUNING)),
                    *options,
                    *(f"--data.per_class={count}", f"--data.batch_size={batch}", f"--epochs={length}"),
                    *([] if name == SCRATCH else [f"--student_weights={start}"]),
                    *(f"--seed={seed}", f"--out={run.folder}", "--resume=true", "--progress=false"),
                ]
    console.print(f"fine-tuning on {' and '.join(map(str, labels))} labelled images of each class")
    if failed := train_all(commands, jobs, console):
        raise RuntimeError(f"{len(failed)} of {len(commands)} runs failed; see {failed[0].folder.with_suffix('.log')}")
    table = _table(out, names, seeds, list(labels))
    write_text(out / "representation.json", json.dumps(table, indent=2) + "\n")
    write_text(out / "representation.md", as_markdown(table))
    console.print(as_markdown(table), markup=False, highlight=False)
    console.print(f"table   {out / 'representation.md'}", soft_wrap=True)
    return rows


Cell = dict[str, Any]
Table = dict[str, dict[str, Cell]]


def _table(out: Path, names: Sequence[str], seeds: int, labels: Sequence[int]) -> Table:
    """Return {"mean", "std", "n"} in percent by row (teacher, random, methods) and column."""
    results = {name: [_result(out / "pretrained" / name / f"seed-{seed}") for seed in range(seeds)] for name in names}
    first = results[names[0]][0]
    table: Table = {"teacher": {name: _spread([first[f"teacher_{name}"]]) for name in ("knn", "linear")}}
    card = read_card(out / "pretrained" / names[0] / "seed-0" / "student.safetensors")
    random = [_measured_at_random(card, seed) for seed in range(seeds)]
    for name, found in {SCRATCH: random, **results}.items():
        table[name] = {column: _spread([one[column] for one in found]) for column in ("knn", "linear")}
        for count in labels:
            runs = [_result(out / f"labels-{count}" / name / f"seed-{seed}") for seed in range(seeds)]
            table[name][f"{count} labels a class"] = _spread([run["top1"] for run in runs])
    return table


def _result(run: Path) -> dict[str, float]:
    last: dict[str, float] = json.loads((run / "result.json").read_text(encoding="utf-8"))["last"]
    return last


def _measured_at_random(card: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Return k-NN and linear probe of the student of a card as it starts, on the data of that card."""
    torch.manual_seed(seed)
    student = load_backbone(card["model"], in_channels=card["in_channels"]).eval()
    meter = Representation(probe=True).meter(torch.device("cpu"), last=True)
    with torch.no_grad():
        for batch in data_of(dict(card)).val_dataloader():
            meter.update(student, batch)
    return meter.compute()


def _spread(values: Sequence[float]) -> Cell:
    percent = [100 * value for value in values]
    deviation = statistics.stdev(percent) if len(percent) > 1 else None
    return {"mean": statistics.mean(percent), "std": deviation, "n": len(percent)}


def as_markdown(table: Table) -> str:
    """Return the table in percent, mean ± standard deviation over seeds, as Markdown.

    >>> print(as_markdown({"teacher": {"knn": {"mean": 90.0, "std": None, "n": 1}}}), end="")
    | | knn |
    | --- | --- |
    | teacher | 90.00 |
    """
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(_cell(row.get(column)) for column in columns)] for name, row in table.items()]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{cell['mean']:.2f}" if cell["std"] is None else f"{cell['mean']:.2f} ± {cell['std']:.2f}"
