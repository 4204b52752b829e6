"""Usage errors of the command line: the wrong option, the reason and a fix; options without effect."""

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diffkd.recipes.trust import HOMES, UsageError

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null", "str": "text"}
# Parts of the parser's messages that are internal to it.
_NOISE = (
    r"Does not validate against any of the Union subtypes Subtypes: .*? Errors:",
    r"Given value type: <class '[^']*'>",
    r"Type collections\.abc\.Callable\[\[.*?\], [\w.]+\] expects a function or a callable class:",
    r"(?:Got|Given) value: .*",
    r"- Expected a <class '(?:NoneType|list)'>",
    r'Parser key "[^"]*":',
    r"Problem with given class_path '[\w.]+':",
)

# Common option names of other programs, and the nested options that replace them.
_ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate", "learning-rate", "base_lr"), "--optimizer.lr"),
    **dict.fromkeys(("weight_decay", "weight-decay", "wd"), "--optimizer.weight_decay"),
    "momentum": "--optimizer.momentum",
    **dict.fromkeys(("batch_size", "batch-size", "bs", "batch"), "--data.batch_size"),
    **dict.fromkeys(("num_workers", "workers", "num-workers"), "--data.num_workers"),
    **dict.fromkeys(("image_size", "img_size", "imgsz", "image-size"), "--data.image_size"),
    **dict.fromkeys(("root", "data_root", "data_dir", "data-dir", "dataset_path"), "--data.root"),
    **dict.fromkeys(("warmup_epochs", "warmup", "warmup-epochs"), "--schedule.warmup_epochs"),
    **dict.fromkeys(("num_epochs", "max_epochs", "epoch"), "--epochs"),
    **dict.fromkeys(("output", "output_dir", "output-dir", "save_dir", "out_dir"), "--out"),
    **dict.fromkeys(("gpus", "gpu", "num_gpus"), "--devices"),
    **dict.fromkeys(("temperature", "tau"), "--method.temperature"),
    "amp": "--precision",
}


def explain(complaint: str, options: Sequence[str], command: str) -> str:
    """Rewrite an error of the parser as one line.

    Args:
        complaint: error message of jsonargparse 4.
        options: the options of the command, such as "--epochs".
        command: name of the command.

    Returns:
        The option, the reason and, if any, the nearest names.
    """
    text = " ".join(complaint.split())
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]*)"', text)))
    option = "--" + ".".join(keys)
    if found := re.search(r"Option '([^']*)' is not accepted|unrecognized arguments: --([\w.]*)", text):
        name = found[1] or found[2]
        kinds = list(re.finditer(r"class_path[= ]'([\w.]+)'", text))
        # For nested options, the innermost one: the last name before the complaint, or the name after it.
        kind = next((one for one in reversed(kinds) if one.start() < found.start()), kinds[0] if kinds else None)
        if keys and (kind is None or kind[1].rpartition(".")[2] in dict(HOMES.values()).values()):
            return f"{option}.{name}: say first what {option} is, by {option} NAME"
        if keys and kind is not None:
            listed = f"`diffkd {command} {option}.help {kind[1]}` lists its options"
            owner = kind[1].rpartition(".")[2]
            nearest = _nearest_names(name, _arguments(kind[1]))
            return f"{option}.{name}: {owner} has no option {name!r}; {nearest or listed}"
        listed = f"`diffkd {command} --help` lists all"
        if (meant := _ELSEWHERE.get(name)) and (meant in options or meant.partition(".")[0] in options):
            return f"there is no option --{name}; it is {meant}"
        return f"there is no option --{name}; {_nearest_names(f'--{name}', options) or listed}"
    if found := re.search(r"ambiguous option: (\S+) could match (.*)$", text):
        near = [one.strip() for one in found[2].split(",")]
        near = [one for one in near if not one.endswith("+")] or near
        return f"there is no option {found[1].partition('=')[0]}; nearest: {', '.join(near)}"
    if found := re.search(r"unrecognized arguments: (.*)$", text):
        return f"nothing is known of {found[1]!r}; options begin with --, and `diffkd {command} --help` lists them"
    if found := re.search(r"the following arguments are required: (.*)$", text):
        missing = (f"{option}.{name}" if keys else f"--{name}" for name in found[1].split(", "))
        return f"required, but not given: {', '.join(missing)}"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        base = HOMES.get(keys[-1] if keys else "", ("", "object"))[1]
        names = [f"{found[1]}.{name}" for name in _classes(found[1], base)]
        return "; ".join(
            filter(None, (f"{option}: there is no {found[1]}.{found[2]}", _nearest_names(found[2], names)))
        )
    if keys and (
        found := re.search(r"(?:Unexpected import path format|dot import path string): (\S+?):(\w+)(?= |$)", text)
    ):
        path = Path(found[1])
        how = f"and put its folder on PYTHONPATH: PYTHONPATH={path.parent} diffkd {command} ..."
        return f"{option}: write {path.stem}.{found[2]}, {how}"
    if (found := re.search(r"Expected a dot import path string: (\S+)", text)) and keys and keys[-1] in HOMES:
        names = _classes(*HOMES[keys[-1]])
        return (
            f"{option}: there is no {found[1]!r}; {_nearest_names(found[1], names) or 'there are ' + ', '.join(names)}"
        )
    if found := re.search(r"Not a valid subclass of (\w+)\. Got value: (.*?) Subclass types expect", text):
        return f"{option}: {found[2]} is no {found[1]}, which has its values by name"
    if found := re.search(r"Expected an import path or a subclass spec, but got ([^ .]+)", text):
        return f"{option}: {found[1]} names no class; write package.module.Name"
    if found := re.search(r"No module named '[^']*'|Unexpected import path format: \S+", text):
        how = "write package.module.Name, of a module that is installed or whose folder is on PYTHONPATH"
        return f"{option}: {found[0]}; {how}"
    if found := re.search(r"Unable to load config ['\"]([^'\"]*)['\"]", text):
        parts = [name for name in options if name.startswith(f"{option}.")]
        instead = f"; give its values one by one: {', '.join(parts)}" if parts else ""
        return f"{option}: there is no file of values {found[1]!r}{instead}"
    return _of_type(text, option) if keys else text


def _of_type(text: str, option: str) -> str:
    """Explain a value of a wrong type; from any other message, remove the parser's internals."""
    last = re.split(r"\.? Got value: Namespace", text.rpartition("Parser key ")[2])[0]
    wanted = re.findall(r"Expected an? (typing\.Literal\[[^\]]*\]|<class '[\w.]+'>)", last)
    value = re.search(r"(?:Got|Given) value: (?!NestedArg|Namespace)(.*?)(?= Given value| - |$)", last)
    pairs = [one.count(",") + 1 for one in re.findall(r"[tT]uple\[([^\]]*)\]", last)]
    if pairs and value:
        example = "[" + ",".join(["64"] * pairs[0]) + "]"
        return f"{option}: {value[1]} is no list of {pairs[0]}, as {example} is"
    if value and any(not one.endswith(("'list'>", "'NoneType'>")) for one in wanted):
        return f"{option}: {value[1]!r} is not {' or '.join(dict.fromkeys(_kind(one) for one in wanted))}"
    for noise in _NOISE:
        text = re.sub(noise, "", text)
    reasons = dict.fromkeys(part.strip(" .-") for part in re.split(r"(?:^|\s)- ", text))
    return f"{option}: {'; '.join(filter(None, reasons))}"


def _kind(wanted: str) -> str:
    if found := re.match(r"typing\.Literal\[(.*)\]", wanted):
        return f"one of {found[1]}" if "," in found[1] else found[1]
    name = wanted.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return _KINDS.get(name, f"a {name}")


def _nearest_names(name: str, known: Iterable[str]) -> str:
    """Return "nearest: ..." with close known names, or "" if there are none; ignores case and module."""
    by_end = {one.rpartition(".")[2].lower() if "--" not in one else one: one for one in known}
    end = name if "--" in name else name.rpartition(".")[2].lower()
    near = get_close_matches(end, by_end, n=3)
    return f"nearest: {', '.join(by_end[one] for one in near)}" if near else ""


def _arguments(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def _classes(module: str, base: str) -> list[str]:
    """Return the sorted names of a module's public classes that derive from a class named `base`."""
    known = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    found = (name for name, one in known if base in [parent.__name__ for parent in one.__mro__[1:]] and name[0] != "_")
    return sorted(found, key=str.lower)


_OF_A_TEACHER = (
    "teacher_weights",
    "teacher_weights_key",
    "teacher_pretrained",
    "teacher_options",
    "teacher_cache",
    "teacher_cache_storage",
    "teacher_views",
    "method_weight",
    "method_ramp",
)
# Schedules that use an option.
_SCHEDULE_KINDS = {
    "milestones": ("step",),
    "every": ("step", "exponential"),
    "factor": ("step", "exponential"),
    "floor": ("cosine", "poly"),
    "power": ("poly",),
}


def check_unused_options(words: list[str], values: Any) -> None:
    """Raise UsageError if an option on a command line of `fit` has no effect.

    An option in a file may have no effect: another file or option may have disabled the feature.

    Args:
        words: arguments of the command line.
        values: the values resolved from words and files, by name.
    """
    for option, mend in _unused_options(set(_given_options(words)), values):
        raise UsageError(f"--{option} has no effect {mend}, or leave --{option} out")


def _given_options(words: list[str]) -> Iterator[str]:
    """Yield the names of the options among the words; for nested ones, such as `--schedule.every`, also the parent."""
    for word in words:
        if found := re.match(r"--(\w+)((?:\.\w+)*)", word):
            yield from (found[1], found[1] + found[2])


def _unused_options(given: set[str], values: Any) -> Iterator[tuple[str, str]]:
    """Yield options without effect, with the reason and a fix."""
    if values.teacher is None and "teacher" not in given:  # may be disabled on the same command line
        for name in _OF_A_TEACHER:
            if name in given and values[name] not in (None, False):
                yield name, "without a teacher: give --teacher"
    if "teacher_cache_storage" in given and values.teacher is not None and values.teacher_cache is None:
        yield "teacher_cache_storage", "without a cache: give --teacher_cache FOLDER"
    pairs = values.pairs if isinstance(values.pairs, list) else []
    if "method" in given and values.method is not None and pairs and all(pair.method is not None for pair in pairs):
        yield "method", "where all pairs name a method of their own: give --pairs auto"
    schedule = values.schedule
    for name, kinds in _SCHEDULE_KINDS.items():
        if f"schedule.{name}" in given and schedule.kind not in kinds:
            yield f"schedule.{name}", f"on schedule.kind {schedule.kind}: give --schedule.kind {' or '.join(kinds)}"
    if "schedule.every" in given and schedule.kind == "step" and schedule.milestones:
        yield "schedule.every", "beside schedule.milestones: give --schedule.milestones []"
    if "schedule.warmup_start" in given and not schedule.warmup_epochs:
        yield "schedule.warmup_start", "without warm-up: give --schedule.warmup_epochs"
