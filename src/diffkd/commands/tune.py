"""`tune`: search the weights and options of a recipe's method on a held-out part of the training data."""

import copy
import inspect
import json as json_lines
import math
import multiprocessing
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
import yaml
from filelock import FileLock
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from diffkd.commands.arguments import fit_with, values_of_fit
from diffkd.commands.compare import START_METHOD, cores, find_method
from diffkd.commands.launchers import LauncherName, check_launcher, on_cluster
from diffkd.data import hold_out
from diffkd.files.config import differences
from diffkd.files.weights import write_text
from diffkd.recipes import find_recipe
from diffkd.recipes.trust import UsageError, named_code, own_code, trust_words
from diffkd.reports.plots import write_figure
from diffkd.tasks.distributed import is_first_process, single_process
from diffkd.training.fit import fit

What = Literal["weights", "options", "all"]
_FACTORS = ("weight", "alpha", "beta", "gamma", "temperature", "balance")
_LEFT_OUT = (
    "checkpoint",
    "features_only",
    "last_stage",
    "logits_autoencoder",
)  # these change cost or pairs, not what is learned


@dataclass(frozen=True)
class Axis:
    """Search space of one value of a recipe.

    Args:
        choices: the choices; empty: a number between `low` and `high`.
        low: smallest value.
        high: largest value.
        log: sample log-uniformly.
    """

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def suggest(self, trial: Any, name: str) -> Any:
        """Return the value for a trial of the study."""
        if self.choices:
            # The storage supports only strings, numbers and booleans.
            return json_lines.loads(trial.suggest_categorical(name, [json_lines.dumps(one) for one in self.choices]))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def stored(self, value: Any) -> Any:
        """Return a value as stored in the study; None if it is not on the axis."""
        if self.choices:
            return json_lines.dumps(value) if value in self.choices else None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if number and self.low <= value <= self.high else None


def tune(
    recipe: str,
    out: Path,
    *,
    method: str | None = None,
    space: str | None = None,
    what: What = "weights",
    trials: int = 30,
    jobs: int = 1,
    launcher: LauncherName = "processes",
    launcher_options: dict[str, Any] | None = None,
    seeds: int = 1,
    share: float = 0.2,
    prune: bool = True,
    trust: list[str] | None = None,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Tune the values of a recipe's method with Optuna, and write the best recipe.

    Every trial is a `diffkd fit` whose score is measured on a held-out part of the training data; the evaluation and
    test data are not read. The study is stored in `out/study.db`: if called again, also in other processes, it
    continues until `trials` are done. The first trial uses the recipe's own values. Trials below the median at the same
    epoch are stopped, as are trials that diverge or have incompatible options.

    Args:
        recipe: file, or name of a recipe in the package.
        out: folder of the study: `best.yaml`, the recipe with the best values; `trials.csv`; `study.png`;
            `importance.json`, the importance of each value; and the runs.
        method: name of a method in the package, or file of its values, as for `diffkd compare`; None: the recipe's.
        space: what to search, as YAML or a file of it: values of the recipe by their dotted names, such as
            `{method.init_args.kd_weight: {low: 0.1, high: 10, log: true}, optimizer.init_args.nesterov: [true,
            false]}`. For a list of methods: `method.0.init_args...`. None: values of the methods, see `what`.
        what: without `space`: "weights" searches all factors and temperatures of the methods from a tenth to ten times
            their value, "options" all switches and choices, "all" both.
        trials: number of trials, including those of earlier calls.
        jobs: processes at the same time. On a CPU they share the cores equally.
        launcher: where these are started: on this machine, or on a cluster of Ray or, by submitit, of SLURM. `out` must
            then lie on storage that all nodes share and that locks files.
        launcher_options: as for `diffkd compare`.
        seeds: trainings of each trial, whose mean is the score; seeds count up from the recipe's seed.
        share: share of the training data to hold out.
        prune: stop bad trials early.
        trust: your own files and modules whose code recipe and method may name; may be repeated.
        options: further options of `diffkd fit` for all trials.

    Returns:
        "score", "value" and "parameters" of the best trial, and "importance" by parameter.

    Raises:
        ImportError: if Optuna is not installed.
        ValueError: if there is nothing to search, a number is out of range, a trial would train on several devices, or
            the study in `out` has other settings.
        UsageError: if options are not valid for `diffkd fit`.
        RuntimeError: if no trial succeeded.
    """
    if find_spec("optuna") is None:
        raise ImportError("`diffkd tune` needs optuna: pip install 'diffkd[tune]'")
    check_launcher(launcher, launcher_options)
    if trials < 1 or jobs < 1 or seeds < 1 or not 0 < share < 1:
        raise ValueError(
            f"give at least one trial, job and seed, and a share in (0, 1); got {trials}, {jobs}, {seeds} and {share}"
        )
    out = out.expanduser()
    trusted = [f"--trust={name}" for name in dict.fromkeys([*(trust or ()), *named_code(options)])]
    words = [
        str(find_recipe(recipe)),
        *([f"--config={find_method(method, recipe)}"] if method else []),
        *options,
        *trusted,
    ]
    values = values_of_fit([*words, f"--out={out}"])
    _check_devices(values)
    if values.get("method") is None and values.get("pairs", "auto") == "auto" and space is None:
        raise ValueError("the recipe has no method to search: give --method, or --space with other values of it")
    axes = _given_space(space, values) if space is not None else found_space(values, what)
    if not axes:
        raise ValueError(f"the method has no {what} to search: give --space, such as {{epochs: {{low: 2, high: 9}}}}")
    task: dict[str, Any] = {
        "values": {k: v for k, v in values.items() if k not in ("out", "resume", "progress")},
        "seeds": seeds,
    }
    task |= {"share": share, "axes": {name: _plain(axis) for name, axis in axes.items()}}
    out.mkdir(parents=True, exist_ok=True)
    study = _study(out, prune)
    known = study.user_attrs.get("task")
    if known is not None and (found := differences(known, json_lines.loads(json_lines.dumps(task)))):
        raise ValueError(f"the study in {out} is another one ({found[0]}): give another --out, or its values")
    if known is None:
        study.set_user_attr("task", task)
        own = {name: axis.stored(value_at(values, name)) for name, axis in axes.items()}
        study.enqueue_trial({name: value for name, value in own.items() if value is not None})
    work: tuple[Any, ...] = (str(out), task["values"], axes, trials, seeds, share, prune, trusted, secrets.token_hex(8))
    if launcher != "processes":
        calls = [(*work, job) for job in range(jobs)]
        ended = on_cluster(_search, calls, out, launcher=launcher, jobs=jobs, options=launcher_options)
        if failed := [outcome for _, outcome in ended if isinstance(outcome, Exception)]:
            raise RuntimeError(f"{len(failed)} of {jobs} workers of the study failed: {failed[0]}")
    elif jobs == 1:
        _search(*(*work, 0))
    else:
        _search_side_by_side(jobs, work)
    return _report(_study(out, prune), out, task["values"], axes, Console(stderr=True))


def _check_devices(values: Mapping[str, Any]) -> None:
    """Raise ValueError if a trial would take several processes.

    The trainer starts the further ones by the command line again, which would draw a trial of their own.
    """
    devices, nodes = values.get("devices", 1), values.get("num_nodes", 1)
    if not single_process(devices, nodes):
        raise ValueError(
            f"devices {devices} and num_nodes {nodes}: a trial trains on one device. Give --devices 1, and use the "
            "others by starting the same command once for each, such as CUDA_VISIBLE_DEVICES=0 diffkd tune ... and "
            "CUDA_VISIBLE_DEVICES=1 diffkd tune ..., which share the trials of --out"
        )
    is_first_process(devices, nodes)  # refuses several processes of torchrun


def found_space(values: Mapping[str, Any], what: What) -> dict[str, Axis]:
    """Return the search space of a recipe's methods, by dotted name."""
    axes: dict[str, Axis] = {}
    for name, method in _methods(values):
        chosen = method.get("init_args") or {}
        for key, parameter in inspect.signature(_class_of(method["class_path"])).parameters.items():
            path = f"{name}.init_args.{key}"
            value = chosen.get(key, parameter.default)
            literals = get_args(parameter.annotation) if get_origin(parameter.annotation) is Literal else ()
            if what in ("weights", "all") and key.endswith(_FACTORS) and _is_factor(value):
                axes[path] = Axis(low=value / 10, high=value * 10, log=True)
            elif what in ("options", "all") and key not in _LEFT_OUT and parameter.annotation is bool:
                axes[path] = Axis((False, True))
            elif what in ("options", "all") and literals and key != "variant" and value in literals:
                axes[path] = Axis(literals)
    return axes


def value_at(values: Any, name: str) -> Any:
    """Return the value at a dotted name in nested mappings and lists; None if there is none."""
    for key in name.split("."):
        if isinstance(values, list):
            values = values[int(key)] if key.isdigit() and int(key) < len(values) else None
        else:
            values = values.get(key) if isinstance(values, Mapping) else None
    return values


def with_values(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested values with the values at dotted names replaced.

    Raises:
        ValueError: if a name does not lead to a mapping or list entry.

    >>> with_values({"a": [{"b": 1}], "c": 2}, {"a.0.b": 3})
    {'a': [{'b': 3}], 'c': 2}
    """
    changed: dict[str, Any] = copy.deepcopy(dict(values))
    for name, value in chosen.items():
        *path, last = name.split(".")
        place: Any = changed
        for key in path:
            if isinstance(place, dict) and key == "init_args" and "class_path" in place:
                place.setdefault(key, {})
            inner = value_at(place, key)
            if isinstance(inner, str) and "." in inner:  # a class given only by name
                inner = {"class_path": inner}
                place[int(key) if isinstance(place, list) else key] = inner
            place = inner
        if not isinstance(place, dict):
            raise ValueError(f"the recipe has no {'.'.join(path)} that {last} could be set in: correct the space")
        place[last] = value
    return changed


def _methods(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the methods of a recipe, including those of its pairs, with their dotted names."""
    method = values.get("method")
    named = [(f"method.{index}", one) for index, one in enumerate(method)] if isinstance(method, list) else []
    named += [("method", method)] if method is not None and not isinstance(method, list) else []
    pairs = values.get("pairs")
    if isinstance(pairs, list):
        named += [(f"pairs.{index}.method", pair.get("method")) for index, pair in enumerate(pairs)]
    for name, one in named:
        if isinstance(one, str):
            yield name, {"class_path": one}
        elif isinstance(one, Mapping) and "class_path" in one:
            yield name, dict(one)


def _class_of(path: str) -> Any:
    from importlib import import_module

    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _plain(axis: Axis) -> dict[str, Any]:
    return {"choices": list(axis.choices)} if axis.choices else {"low": axis.low, "high": axis.high, "log": axis.log}


def _given_space(space: str, values: Mapping[str, Any]) -> dict[str, Axis]:
    text = Path(space).read_text(encoding="utf-8") if Path(space).is_file() else space
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--space cannot be read as YAML ({error}): correct it") from error
    if not isinstance(found, dict) or not found:
        raise UsageError("--space holds no values by name, such as {method.init_args.weight: {low: 0.1, high: 10}}")
    axes = {}
    for name, one in found.items():
        axes[str(name)] = _axis(str(name), one)
    # Checks that every name exists before anything is trained.
    with_values(values, {name: axis.choices[0] if axis.choices else axis.low for name, axis in axes.items()})
    return axes


def _axis(name: str, one: Any) -> Axis:
    choices = one if isinstance(one, list) else one.get("choices") if isinstance(one, dict) else None
    if isinstance(choices, list) and len(choices) > 1:
        return Axis(tuple(choices))
    if isinstance(one, dict) and set(one) <= {"low", "high", "log"} and {"low", "high"} <= set(one):
        low, high, log = one["low"], one["high"], one.get("log", False)
        if all(isinstance(end, int | float) for end in (low, high)) and low < high and (low > 0 or not log):
            return Axis(low=low, high=high, log=bool(log))
    raise UsageError(
        f"--space: {name}: {one!r} is nothing to search: give a list of two or more values, or {{low: ..., high: ..., "
        "log: true}} with low below high"
    )


def _study(out: Path, prune: bool) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if prune else optuna.pruners.NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns that heartbeats are experimental
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{(out / 'study.db').resolve()}",
            engine_kwargs={"connect_args": {"timeout": 60}},
            heartbeat_interval=30,
            grace_period=120,
        )
        study = optuna.create_study(
            storage=storage, study_name="tune", direction="maximize", load_if_exists=True, pruner=pruner
        )
    return study


def _sampler(study: Any) -> Any:
    """Return a sampler for one more process of a study, which draws other values than those of all earlier ones."""
    import optuna

    earlier = int(study.user_attrs.get("processes", 0))
    study.set_user_attr("processes", earlier + 1)
    seed = 1000 * earlier + len(study.get_trials(deepcopy=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns that multivariate search is experimental
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=8)


def _search(
    out: str,
    values: dict[str, Any],
    axes: dict[str, Axis],
    trials: int,
    seeds: int,
    share: float,
    prune: bool,
    trusted: Sequence[str],
    call: str,
    job: int,
) -> None:
    """Run trials until the study has `trials` trials, with those that other jobs of the same call are running."""
    _check_devices(values)  # again, as a worker on a cluster may have more devices
    study = _study(Path(out), prune)
    console = Console(stderr=True)
    lock = FileLock(Path(out) / ".study.lock")  # no two jobs begin the last trial
    with lock:
        study.sampler = _sampler(study)
    while True:
        begun: list[int] = []

        def run(trial: Any, begun: list[int] = begun) -> float:
            begun.append(trial.number)
            trial.set_user_attr("job", [call, job])
            lock.release()
            return _trial(trial, Path(out), values, axes, seeds, share, trusted)

        lock.acquire()
        try:
            if _taken(study, call, job) >= trials:
                return
            study.optimize(run, n_trials=1)
        finally:
            lock.release()  # also where no trial could begin; else it is released already
        last = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == begun[0])
        console.print(_describe_trial(last), highlight=False, markup=False, soft_wrap=True)


def _taken(study: Any, call: str, job: int) -> int:
    """Return the number of trials that are done, or that other jobs of this call are running.

    What runs under the name of this job was left by a worker that was lost, and in whose place this one is.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    done = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
    owners = [trial.user_attrs.get("job") for trial in trials if trial.state == TrialState.RUNNING]
    return int(done + sum(owner is not None and owner[0] == call and owner[1] != job for owner in owners))


def _describe_trial(trial: Any) -> str:
    value = "-" if trial.value is None else f"{100 * trial.value:.2f} %"
    reason = f" ({trial.user_attrs['reason']})" if "reason" in trial.user_attrs else ""
    chosen = ", ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in trial.params.items())
    return f"trial {trial.number}: {trial.state.name.lower()}{reason} {value}  {chosen}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).strip('"')


def _trial(
    trial: Any,
    out: Path,
    values: dict[str, Any],
    axes: dict[str, Axis],
    seeds: int,
    share: float,
    trusted: Sequence[str],
) -> float:
    """Train with the values of a trial, and return its score on the held-out data."""
    from optuna import TrialPruned

    folder = out / f"trial-{trial.number:04d}"
    folder.mkdir(exist_ok=True)
    chosen = {name: axis.suggest(trial, name) for name, axis in axes.items()}
    recipe = folder / "recipe.yaml"
    write_text(recipe, yaml.safe_dump(with_values(values, chosen), sort_keys=False))
    scores = []
    for number in range(seeds):
        seed = int(values.get("seed") or 0) + number

        def watch(row: Mapping[str, Any], score: str, first: bool = number == 0) -> None:
            if not first:
                return
            trial.report(float(row[score]), int(row["epoch"]))
            if trial.should_prune():
                raise TrialPruned

        words = [str(recipe), f"--out={folder / f'seed-{seed}'}", f"--seed={seed}", "--progress=false", *trusted]
        try:
            result = fit_with(words, use=_fit_on_part(share, watch))
        except (ValueError, FloatingPointError) as error:
            if trial.number == 0:
                raise  # the recipe's own values fail
            trial.set_user_attr("reason", " ".join(str(error).split())[:200])
            raise TrialPruned from error
        trial.set_user_attr("score", result["score"])
        scores.append(float(result["last"][result["score"]]))
    return sum(scores) / len(scores)


def _fit_on_part(share: float, watch: Callable[[Mapping[str, Any], str], None]) -> Callable[..., dict[str, Any]]:
    """Return a `fit` that holds out a fixed share of the training data and recreates its folder."""

    def run(**arguments: Any) -> dict[str, Any]:
        config = arguments.get("config") or {}
        data = hold_out(arguments.pop("data"), share)
        return fit(data=data, on_epoch=watch, **(arguments | {"config": {**config, "held_out": share}}))

    return run


def _worker(threads: int, work: tuple[Any, ...], job: int) -> None:
    torch.set_num_threads(threads)
    every = (*work, job)
    _search(*every)


def _search_side_by_side(jobs: int, work: tuple[Any, ...]) -> None:
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores() // jobs)
    context: Any = multiprocessing.get_context(START_METHOD)
    processes = [context.Process(target=_worker, args=(threads, work, job)) for job in range(jobs)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"{len(failed)} of {jobs} processes of the study failed; see above")


def _report(study: Any, out: Path, values: dict[str, Any], axes: dict[str, Axis], console: Console) -> dict[str, Any]:
    """Write and print the results."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not done:
        reasons = {trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs}
        raise RuntimeError(f"no trial of {len(trials)} has succeeded{': ' + sorted(reasons)[0] if reasons else ''}")
    best = max(done, key=lambda trial: trial.value)
    chosen = {
        name: json_lines.loads(best.params[name]) if axis.choices else best.params[name] for name, axis in axes.items()
    }
    importance = _importance(study, done)
    recipe = {k: v for k, v in with_values(values, chosen).items() if k != "out"}
    score = f"{best.user_attrs['score']} {100 * best.value:.2f} %"
    title = f"# Best of {len(trials)} trials on held-out training data: {score}\n"
    write_text(out / "best.yaml", title + yaml.safe_dump(recipe, sort_keys=False))
    write_text(out / "importance.json", json_lines.dumps(importance, indent=2) + "\n")
    lines = [",".join(["trial", "state", "value", *axes])]
    for trial in trials:
        numbers = [trial.number, trial.state.name, "" if trial.value is None else trial.value]
        lines.append(",".join(str(cell) for cell in [*numbers, *(_short(trial.params.get(name, "")) for name in axes)]))
    write_text(out / "trials.csv", "\n".join(lines) + "\n")
    _draw(out / "study.png", trials, importance, best.user_attrs["score"])
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("value", "best", "mattered"):
        table.add_column(column)
    for name in axes:
        table.add_row(name, _short(chosen[name]), f"{importance[name]:.2f}" if name in importance else "-")
    console.print(table)
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    console.print(
        f"best: trial {best.number}, {score} on held-out training data; {len(done)} trials done, {pruned} stopped "
        f"early. diffkd fit {out / 'best.yaml'} --out FOLDER{trust_words(own_code(values))} trains it on all",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return {
        "score": best.user_attrs["score"],
        "value": best.value,
        "parameters": chosen,
        "importance": importance,
    }


def _importance(study: Any, done: Sequence[Any]) -> dict[str, float]:
    """Return the importance of each value, which add up to 1; {} if there are too few trials.

    Uses PED-ANOVA (Watanabe, Bansal, Hutter, IJCAI 2023), which needs no further package.
    """
    import optuna

    if len(done) < 4 or len({trial.value for trial in done}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        try:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError):
            return {}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _draw(path: Path, trials: Sequence[Any], importance: Mapping[str, float], score: str) -> None:
    """Draw the trials with the best so far, and the importance of values."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    course, bars = figure.subplots(1, 2)
    done = [(trial.number, 100 * trial.value) for trial in trials if trial.value is not None]
    kept = [(n, v) for n, v in done if trials[n].state.name == "COMPLETE"]
    stopped = [(n, v) for n, v in done if trials[n].state.name == "PRUNED"]
    for points, label in ((kept, "done"), (stopped, "stopped early")):
        if points:
            course.plot(*zip(*points, strict=True), "o", label=label, alpha=0.7)
    best = [(n, max(v for m, v in kept if m <= n)) for n, _ in kept]
    course.step(*zip(*best, strict=True), where="post", label="best so far")
    course.set(xlabel="trial", ylabel=f"{score} (%), held-out training data")
    course.legend()
    names = sorted(importance, key=lambda name: importance[name])
    bars.barh([name.replace("init_args.", "") for name in names], [importance[name] for name in names])
    bars.set(xlabel="share of what made the difference", title="" if names else "too few trials to tell")
    write_figure(path, figure)
