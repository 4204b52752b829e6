"""Which of several pairs on a command line, and which class in it, a complaint is about."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def name_pair(message: str, pairs: Any, complains: Callable[[list[str]], bool]) -> str:
    """Return a message about `--pairs` with the number of the pair, the class of its method, and a mend.

    Args:
        message: that begins with the option, such as "--pairs.method.scale: 'x' is not a number".
        pairs: all of them, as they were given.
        complains: whether the parser complains about the pairs among some words of a command line.
    """
    if not message.startswith("--pairs.") or not isinstance(pairs, Sequence) or isinstance(pairs, str):
        return message
    for number, pair in enumerate(pairs):
        if complains([f"--pairs={json.dumps([pair], default=str)}"]):
            option, colon, reason = message.partition(": ")
            method = pair.get("method") if isinstance(pair, Mapping) else None
            path = method.get("class_path") if isinstance(method, Mapping) else method
            inside = option.startswith("--pairs.method.") and isinstance(path, str)
            whose = f" of {path}" if inside else ""
            mend = "" if ";" in reason else f"; give what {path if inside else 'a Pair'} takes there"
            return f"--pairs[{number}]{option.removeprefix('--pairs')}{whose}{colon}{reason}{mend}"
    return message
