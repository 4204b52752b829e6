"""Options that were typed and have no effect: said, since their user believes that they have one."""

import re
from collections.abc import Iterator
from typing import Any

from diffkd.misuse import Misuse

_OF_A_TEACHER = (
    "teacher_weights",
    "teacher_pretrained",
    "teacher_options",
    "teacher_cache",
    "teacher_cache_storage",
    "teacher_views",
    "method_weight",
    "method_ramp",
)
# Kinds of schedule that heed an option.
_KINDS = {
    "milestones": ("step",),
    "every": ("step", "exponential"),
    "factor": ("step", "exponential"),
    "floor": ("cosine", "poly"),
    "power": ("poly",),
}


def check_idle(words: list[str], values: Any) -> None:
    """Raise Misuse if an option on a command line of `fit` has no effect.

    What only stands in a file may have none: another file, or another option, has switched off what it is for.

    Args:
        words: of the command line.
        values: what was resolved from words and files, by name.
    """
    for option, mend in _idle(set(_given(words)), values):
        raise Misuse(f"--{option} has no effect {mend}, or leave --{option} out")


def _given(words: list[str]) -> Iterator[str]:
    """Yield the names of the options among the words; of those of a part, such as `--schedule.every`, the part too."""
    for word in words:
        if found := re.match(r"--(\w+)((?:\.\w+)*)", word):
            yield from (found[1], found[1] + found[2])


def _idle(given: set[str], values: Any) -> Iterator[tuple[str, str]]:
    """Yield options without effect, and why and what to do instead."""
    if values.teacher is None and "teacher" not in given:  # which may be switched off in the same words
        for name in _OF_A_TEACHER:
            if name in given and values[name] not in (None, False):
                yield name, "without a teacher: give --teacher"
    if "teacher_cache_storage" in given and values.teacher is not None and values.teacher_cache is None:
        yield "teacher_cache_storage", "without a cache: give --teacher_cache FOLDER"
    pairs = values.pairs if isinstance(values.pairs, list) else []
    if "method" in given and values.method is not None and pairs and all(pair.method is not None for pair in pairs):
        yield "method", "where all pairs name a method of their own: give --pairs auto"
    schedule = values.schedule
    for name, kinds in _KINDS.items():
        if f"schedule.{name}" in given and schedule.kind not in kinds:
            yield f"schedule.{name}", f"on schedule.kind {schedule.kind}: give --schedule.kind {' or '.join(kinds)}"
    if "schedule.every" in given and schedule.kind == "step" and schedule.milestones:
        yield "schedule.every", "beside schedule.milestones: give --schedule.milestones []"
    if "schedule.warmup_start" in given and not schedule.warmup_epochs:
        yield "schedule.warmup_start", "without warm-up: give --schedule.warmup_epochs"
