"""`diffkd compare`: train a recipe with several methods and seeds, and tabulate the results."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from diffkd.commands.arguments import fit_with, values_of_fit
from diffkd.commands.launchers import LauncherName, check_launcher, check_started_once, on_cluster
from diffkd.commands.report import write_report_of
from diffkd.commands.step_cost import step_costs
from diffkd.files.history import read_csv
from diffkd.files.run_folder import RunFolder
from diffkd.files.values import read_json_file, read_yaml_file
from diffkd.files.weights import write_text
from diffkd.recipes import find_recipe, recipe_names
from diffkd.recipes.trust import UsageError, named_code
from diffkd.reports.plots import draw_results
from diffkd.reports.tables import (
    REFERENCES,
    Row,
    as_json,
    as_latex,
    as_markdown,
    cells,
    summarize,
    write_all_measurements,
)
from diffkd.tasks.distributed import single_process, without_launcher
from diffkd.training.checkpointing import Interrupted

COSTS = "step_cost.json"
# Columns left out on a narrow terminal, in this order.
_OPTIONAL_COLUMNS = ("MiB", "+ training", "best epoch", "s", "parameters", "n", "vs alone (p)")
_MOST_RUNS = 10_000
ROUNDS = 12
"""Rounds in which the steps of the methods are timed."""
START_METHOD: Literal["spawn", "forkserver"] = "spawn"
"""How processes of runs start: not forked, as CUDA and threads do not survive a fork."""
DEFAULT_METHODS = ("alone", "kd", "dist", "fitnet", "diffkd")
RECOMMENDED = "diffkd-direct"
"""Name of the recommended preset, of which there is one for each task: the demonstrations show and keep its student."""


@dataclass(frozen=True)
class Run:
    """One run of a comparison: method, seed and folder."""

    method: str
    seed: int
    folder: Path


def compare(
    recipe: str,
    out: Path,
    *,
    methods: list[str] | None = None,
    pretrained: list[str] | None = None,
    seeds: int = 3,
    jobs: int | None = None,
    devices: list[int] | None = None,
    launcher: LauncherName = "processes",
    launcher_options: dict[str, Any] | None = None,
    cost: bool = True,
    json: bool = False,
    markdown: bool = False,
    latex: bool = False,
    trust: list[str] | None = None,
    options: Sequence[str] = (),
) -> list[Row]:
    """Train a recipe with several methods, each from several seeds, and write one table.

    Every run is a separate `diffkd fit` in `out/METHOD/seed-N`. If called again, it skips finished runs, resumes
    interrupted ones, and rewrites the table: `comparison.json`, `.md`, `.tex` and `.png` in `out`, the page
    `report.html`, and `measurements.json` and `.md` with all other measurements.

    Args:
        recipe: file, or name of a recipe in the package.
        out: folder of the comparison.
        methods: names of methods in the package ("alone", "kd", "diffkd", ...; `diffkd recipes` lists them under
            "methods/"), or files that set other values of the recipe. A plain name selects the values for the recipe's
            pair of networks, data or task, if there are any (:func:`find_method`). If the recipe's method has the same
            class, its other options are kept.
        pretrained: folders of comparisons, or of single methods in them, whose students are trained on here: beside
            each of `methods` (by default "alone") stands a row for each pretraining, such as "alone-from-cosine",
            whose seed N starts from the student of seed N (`student_weights`). The methods themselves start as without
            this option, but not from the recipe's own `student_weights`.
        seeds: number of seeds, from 0.
        jobs: runs at the same time; None: 1, or all that a cluster has room for. On a CPU they share the cores equally.
        devices: GPUs to distribute the runs over, such as [0, 1]; None: the first, or the CPU.
        launcher: where the runs are started: as processes of this machine, on a cluster of Ray, or on one of SLURM by
            submitit. A run whose node is lost goes on elsewhere from its checkpoint; `out` must lie on storage that all
            nodes share.
        launcher_options: for Ray {address: ..., num_cpus: 4, num_gpus: 1}, for submitit {slurm_partition: ...,
            timeout_min: 600, gpus_per_node: 1} and its other parameters.
        cost: measure the relative cost of a training step of each method after all runs. If that fails, as where the
            memory does not hold all methods side by side, the table has no costs.
        json: print the table as JSON.
        markdown: print it as Markdown.
        latex: print it as LaTeX.
        trust: files and modules of your own whose code recipe and methods may name; may be repeated.
        options: further options of `diffkd fit` for all runs; options of teacher and method are not applied to the
            student alone.

    Returns:
        A row per method.

    Raises:
        ValueError: if there are no methods, seeds or jobs, a name is given twice, a run in `out` was started with
            other values, a run is to train on several machines, or a launcher started several processes; nothing is
            trained then.
        FileNotFoundError: if a preset or a pretrained student is missing; nothing is trained then.
        UsageError: if options are not valid for `diffkd fit` or for a method; nothing is trained then.
        ImportError: if the launcher's library is not installed.
        RuntimeError: if runs failed; the others are finished and in the table, and the message names the logs.
    """
    out = out.expanduser()
    if methods is None:
        methods = ["alone"] if pretrained else list(DEFAULT_METHODS)
    names = [Path(method).stem for method in methods]
    check_started_once("compare")
    check_launcher(launcher, launcher_options)
    if launcher != "processes" and devices:
        raise ValueError("devices are GPUs of this machine: give a cluster's by --launcher_options, and leave them out")
    if not methods or len(set(names)) < len(names) or seeds < 1 or (jobs is not None and jobs < 1):
        raise ValueError(f"give different methods, and at least one seed and job; got {methods}, {seeds} and {jobs}")
    starts = find_pretrained(pretrained or (), seeds)
    if len(methods) * (1 + len(starts)) * seeds > _MOST_RUNS:
        raise ValueError(
            f"{len(methods) * (1 + len(starts))} methods from {seeds} seeds each are more than {_MOST_RUNS} runs: give "
            "fewer --seeds"
        )
    recipe_file = find_recipe(recipe)
    presets = {name: find_method(method, recipe) for name, method in zip(names, methods, strict=True)}
    started = {f"{name}-from-{start}": (name, start) for start in starts for name in names}
    if doubled := next((name for name in started if name in presets), None):
        raise ValueError(f"{doubled!r} is both a method's file and a pretraining's row: give the file another name")
    names += started
    presets |= {row: presets[name] for row, (name, _) in started.items()}
    # For all runs, also those without a teacher, whose options that name code are removed.
    trusted = [f"--trust={name}" for name in dict.fromkeys([*(trust or ()), *named_code(options)])]
    # Runs without a teacher stay so, even if the options set a teacher for the others.
    alone = [*_without_method(options), "--teacher=null"]
    meant = {name: alone if _sets_no_teacher(preset) else options for name, preset in presets.items()}
    # Recipes for fine-tuning name weights of their own, which a row beside those of the pretrainings does without.
    afresh = ["--student_weights=null"] if starts else []
    # Seed by seed, so that an interrupted comparison has results of every method.
    runs = [Run(name, seed, out / name / f"seed-{seed}") for seed in range(seeds) for name in names]
    console = Console(stderr=True)
    commands = {
        run: [
            *(str(recipe_file), *afresh, f"--config={presets[run.method]}", *meant[run.method]),
            *(_start_from(starts[started[run.method][1]][run.seed]) if run.method in started else []),
            *(f"--seed={run.seed}", f"--out={run.folder}", "--resume=true", "--progress=false"),
            *([f"--devices=[{devices[index % len(devices)]}]"] if devices else []),
            *trusted,
        ]
        for index, run in enumerate(runs)
    }
    for run, words in commands.items():
        if run.seed == 0 or run.folder.is_dir():
            try:
                values = values_of_fit(words)
            except UsageError as error:
                raise UsageError(f"{error} ({run.method} with the options of the comparison)") from error
            if seeds > 1:
                _check_cache(values)
            if values.get("num_nodes", 1) > 1:
                raise ValueError(
                    "--num_nodes: the runs of a comparison train on one machine each; start a run on several by "
                    "`diffkd fit` on each of them"
                )
            RunFolder(run.folder).check(values, resume=True)
    console.print("methods")  # indented, as a line that began with "diffkd:" would read like an error
    for name, preset in presets.items():
        line = f"  {name:{max(map(len, presets))}}  {_preset_name(preset)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if launcher == "processes":
        failed = train_all(commands, jobs or 1, console)
    else:
        failed = _train_on_cluster(commands, out, console, launcher=launcher, jobs=jobs, options=launcher_options)
    rows = report(out, names, seeds)  # before the costs, which may fail though all runs are done
    timed = {run.method: commands[run] for run in runs if run.seed == 0 and run not in failed}
    if cost and write_costs(out, timed, console):
        rows = report(out, names, seeds)
    if rows:
        console.print(rich_table(rows, console.width))
        write_report_of(out, tell=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
    for wanted, text in ((json, _json_text(rows)), (markdown, as_markdown(rows)), (latex, as_latex(rows))):
        if wanted:
            print(text, end="")  # noqa: T201
    if failed:
        logs = ", ".join(str(run.folder.with_suffix(".log")) for run in failed)
        rest = " The others are in the table." if rows else ""
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs failed; see {logs}.{rest}")
    return rows


def _check_cache(values: Mapping[str, Any]) -> None:
    """Raise ValueError if the runs share a teacher cache, but each seed draws other training images."""
    data = values.get("data")
    given = (data.get("init_args") or {}) if isinstance(data, Mapping) else {}
    drawn = given.get("val_share") is not None
    if str((data or {}).get("class_path")).endswith("UnlabelledFolder"):
        drawn = given.get("val") is None  # where there is a folder `val`, the share counts for nothing
    if drawn and values.get("teacher_cache") is not None:
        raise ValueError(
            f"--teacher_cache {values['teacher_cache']} holds the features of the training images of one seed, and "
            f"val_share={given.get('val_share')} draws others from each: give folders for training and evaluation "
            "instead of val_share, or --seeds 1, or leave the cache out"
        )


def find_method(method: str, recipe: str | None = None) -> Path:
    """Return the file with a method's values: a path, or the name of a file in the package.

    For a recipe, a plain name such as "dkd" is searched in "methods/cifar100/resnet56-resnet20" (the recipe's own
    name), then in "methods/cifar100", in the folder of its task ("methods/detection", ...) if that is its own, last in
    "methods".

    Raises:
        FileNotFoundError: if it is neither.
    """
    if Path(method).is_file():
        return find_recipe(method)
    if recipe is not None and "/" not in method:
        known = set(recipe_names())
        for folder in (recipe, recipe.rpartition("/")[0], _task_of(recipe)):
            if folder and f"methods/{folder}/{method}" in known:
                return find_recipe(f"methods/{folder}/{method}")
    return find_recipe(f"methods/{method}")


def find_pretrained(folders: Sequence[str], seeds: int) -> dict[str, list[Path]]:
    """Return the folders of pretrained students, of seed 0 and so on, by the name of their pretraining.

    Args:
        folders: of comparisons, each of which holds a folder for a method, or of methods, each of which holds `seed-N`.
        seeds: number of seeds.

    Raises:
        FileNotFoundError: if there is no finished run of a seed.
        ValueError: if two pretrainings have one name.
    """
    found: dict[str, list[Path]] = {}
    for folder in (Path(one).expanduser() for one in folders):
        below = [folder] if (folder / "seed-0").is_dir() else sorted(run.parent for run in folder.glob("*/seed-0"))
        if not below:
            raise FileNotFoundError(
                f"pretrained {folder} is no comparison: there is neither seed-0 nor METHOD/seed-0 in it; give the "
                "folder that `diffkd compare` wrote (--out), or that of a method in it"
            )
        for method in below:
            if method.name in found:
                raise ValueError(f"two pretrainings are named {method.name!r}: rename one of their folders")
            found[method.name] = [method / f"seed-{seed}" for seed in range(seeds)]
            for run in found[method.name]:
                if not RunFolder(run).student.is_file():
                    raise FileNotFoundError(
                        f"pretrained {run} is no finished run: finish it, give fewer --seeds than {seeds}, or name the "
                        "methods to start from by their own folders"
                    )
    return found


def _start_from(student: Path) -> list[str]:
    """Return the options of `diffkd fit` that start a student from another one, whatever the recipe starts it from."""
    others = ["--student_pretrained=false", "--pretrained_backbone=false", "--backbone_weights=null"]
    return [f"--student_weights={student}", *others]


def _preset_name(preset: Path) -> str:
    """Return the name of a preset in the package, or the path of another file."""
    names = {find_recipe(name): name for name in recipe_names() if name.startswith("methods/")}
    return names.get(preset, str(preset))


def _task_of(recipe: str) -> str:
    """Return the task of a recipe's data if it is another than classification, "" otherwise."""
    values = read_yaml_file(find_recipe(recipe)) or {}
    data = values.get("data") if isinstance(values, dict) else None
    name = str(data.get("class_path") if isinstance(data, dict) else data)
    if "Detection" in name:
        return "detection"
    arguments = data.get("init_args") if isinstance(data, dict) else None
    if name.endswith("UnlabelledFolder") or (isinstance(arguments, dict) and arguments.get("labels") is False):
        return "representation"
    scenes = ("MaskFolder", "Cityscapes", "VocSegmentation", "Ade20k", "SegmentationScenes")
    return "segmentation" if name.endswith(scenes) else ""


def _sets_no_teacher(preset: Path) -> bool:
    values = read_yaml_file(preset) or {}
    return isinstance(values, dict) and values.get("teacher", "kept") is None


def _without_method(options: Sequence[str]) -> list[str]:
    """Remove the options of the method and its pairs, with their values, from options of `diffkd fit`."""
    kept: list[str] = []
    dropped = False
    for word in options:
        if word.startswith("--"):
            dropped = re.match(r"--(method|pairs)(\W|$)", word) is not None
        if not dropped:
            kept.append(word)
    return kept


def write_costs(out: Path, commands: Mapping[str, list[str]], console: Console) -> bool:
    """Measure the step cost of every method and write the file of costs, unless it already has all of them.

    Returns:
        Whether the file was written. If a step cannot be taken, a warning says why.
    """
    file = out / COSTS
    reference = next((method for method in REFERENCES[::-1] if method in commands), next(iter(commands), None))
    known = read_json_file(file) if file.is_file() else {}
    if reference is None or (known.get("reference") == reference and set(commands) <= set(known["methods"])):
        return False
    console.print(f"measuring a training step of {len(commands)} methods, side by side")
    try:
        costs = step_costs(commands, reference, rounds=ROUNDS)
    except Exception as error:  # of the user's own models and data any; the runs are done, and their table is whole
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        console.print(
            f"warning: the table has no costs of a training step, as it could not be measured ({reason}); the same "
            "command measures it again, with --cost=false it is left out",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return False
    facts = {
        "reference": reference,
        "threads": torch.get_num_threads(),
        "methods": {method: asdict(one) for method, one in costs.items()},
    }
    write_text(file, json.dumps(facts, indent=2) + "\n")
    return True


def report(out: Path, methods: Sequence[str], seeds: int) -> list[Row]:
    """Write table and curves of the finished runs in a comparison's folder, and return the rows."""
    results: dict[str, dict[int, Any]] = {}
    curves: dict[str, list[list[float]]] = {}
    for method in methods:
        for seed in range(seeds):
            folder = out / method / f"seed-{seed}"
            if (folder / "result.json").is_file():
                results.setdefault(method, {})[seed] = RunFolder(folder).read_result()
                score = results[method][seed]["score"]
                history = read_csv(folder / "metrics.csv")
                curves.setdefault(method, []).append([100 * float(row[score]) for row in history])
    if not results:
        return []
    first = next(iter(next(iter(results.values())).values()))
    score = first["score"]
    costs = read_json_file(out / COSTS) if (out / COSTS).is_file() else None
    rows = summarize(results, score, costs)
    facts = {"device": first["device"], "versions": first["versions"], "metric": score, "rows": as_json(rows)}
    if costs is not None:
        facts["step_cost"] = costs
    texts = {"json": json.dumps(facts, indent=2) + "\n", "md": as_markdown(rows), "tex": as_latex(rows)}
    for suffix, text in texts.items():
        write_text(out / f"comparison.{suffix}", text)
    write_all_measurements(out, results)
    draw_results(out / "comparison.png", curves, ylabel=f"{score} (%)")
    return rows


def rich_table(rows: Sequence[Row], width: int) -> Table:
    """Return the rows as a table for a terminal of `width` columns; a narrow one omits some columns."""
    kept = {title: column for title, *column in zip(*cells(rows), strict=True)}
    for title in _OPTIONAL_COLUMNS:
        if sum(3 + max(map(len, [title, *column])) for title, column in kept.items()) <= width:
            break
        kept.pop(title, None)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in kept:
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for line in zip(*kept.values(), strict=True):
        table.add_row(*line)
    return table


def train_all(commands: Mapping[Run, list[str]], jobs: int, console: Console) -> list[Run]:
    """Train each run in a separate process, and return the runs that failed.

    Args:
        commands: for each run, the words of its `diffkd fit`.
        jobs: runs at the same time; on a CPU they share the cores equally.
        console: console for progress messages.
    """
    failed, started = [], time.monotonic()
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores() // jobs)
    context = multiprocessing.get_context(START_METHOD)
    previous = {signum: signal.signal(signum, _stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    with ProcessPoolExecutor(jobs, context, _start_worker, (threads,)) as pool:
        futures = {pool.submit(_train, run, words): run for run, words in commands.items()}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                run = futures[future]
                if reason := future.result():
                    failed.append(run)
                outcome = f"failed: {reason}" if reason else f"done  {(time.monotonic() - started) / 60:.1f} min"
                console.print(
                    f"{done}/{len(futures)}  {run.method} seed {run.seed} {outcome}", markup=False, soft_wrap=True
                )
        except BaseException as error:
            for child in multiprocessing.active_children():
                child.terminate()  # a run saves a checkpoint on SIGTERM
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise RuntimeError(
                    "the process of a run was killed, as the system does where memory runs out; the others have saved "
                    "their checkpoints, and the same command goes on with it: give fewer --jobs if it happens again"
                ) from error
            raise
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
    return failed


def _train_on_cluster(
    commands: Mapping[Run, list[str]],
    out: Path,
    console: Console,
    *,
    launcher: LauncherName,
    jobs: int | None,
    options: Mapping[str, Any] | None,
) -> list[Run]:
    """Train each run on a cluster, and return the runs that failed."""
    runs, failed, started = list(commands), [], time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    calls = [(run, words) for run, words in commands.items()]
    previous = {signum: signal.signal(signum, _stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        ended = on_cluster(_train, calls, out, launcher=launcher, jobs=jobs, options=options)
        for done, (index, outcome) in enumerate(ended, 1):
            run, reason = runs[index], " ".join(str(outcome).split())
            if isinstance(outcome, Exception):  # which did not come from the training, and is in no log yet
                reason = reason or type(outcome).__name__
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                with run.folder.with_suffix(".log").open("a", encoding="utf-8") as log:
                    log.write(f"{outcome}\n")
            if reason:
                failed.append(run)
            said = f"failed: {reason}" if reason else f"done  {(time.monotonic() - started) / 60:.1f} min"
            console.print(f"{done}/{len(runs)}  {run.method} seed {run.seed} {said}", markup=False, soft_wrap=True)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    return failed


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Interrupted("the comparison was stopped; the same command goes on with it", signum)


def _start_worker(threads: int) -> None:
    """Set the number of threads, and ignore Ctrl-C, which also reaches workers: the parent process stops them.

    If the parent process is killed, so that it cannot, the worker stops by itself, with a checkpoint.
    """
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_stop_after_parent, daemon=True).start()


def _stop_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train(run: Run, words: list[str]) -> str:
    """Train one run, with its output in a log beside its folder; return why it failed, "" on success.

    On several devices it is a process of its own, as the trainer starts the further ones by the same command line.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # the parent process has ended, so the result is not needed
    if (run.folder / "result.json").is_file():
        return ""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.folder.with_suffix(".log").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            values = values_of_fit(words)
            if not single_process(values.get("devices", 1), values.get("num_nodes", 1)):
                return _fit_apart(words, log)
            fit_with(words)
        except Interrupted as stopped:
            # End the process with its run, so that it does not take the next one from the queue.
            print(stopped, flush=True)  # noqa: T201
            os._exit(128 + stopped.signum)
        except Exception as error:
            traceback.print_exc()
            return " ".join(str(error).split()) or type(error).__name__
    return ""


def _fit_apart(words: list[str], log: TextIO) -> str:
    """Train by a `diffkd fit` of its own, which saves a checkpoint if this process gets a SIGTERM.

    Args:
        words: of the command line.
        log: takes its output.

    Returns:
        Why it failed, "" on success.

    Raises:
        Interrupted: if it was stopped.
    """
    asked: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        for process in running:
            process.terminate()

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    log.flush()
    start = log.tell()
    environment = without_launcher() | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
    }
    try:
        # In a session of its own, so that all of its processes can be ended with it.
        process = subprocess.Popen(
            [sys.executable, "-m", "diffkd", "fit", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        running.append(process)
        try:
            if asked:
                process.terminate()
            code = process.wait()
        finally:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    if asked or code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Interrupted("the run was stopped", asked[0] if asked else code - 128)
    if code == 0:
        return ""
    said = [line for line in Path(log.name).read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("diffkd: ") and not line.startswith("diffkd: warning")]
    ended = f"its process ended with code {code}"
    return errors[-1].removeprefix("diffkd: ") if errors else f"{ended}: {said[-1].strip()}" if said else ended


def _json_text(rows: Sequence[Row]) -> str:
    return json.dumps(as_json(rows), indent=2) + "\n"
