"""A method or optimiser that takes another's place starts from its own values."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

# What the parser forgets the values of an earlier method, and of an earlier optimiser, by.
_NONE = {"method": "null", "optimizer": "torch.optim.Optimizer"}


def with_own_values(words: list[str], optimizer: Any) -> list[str]:
    """Make the words of a command line forget a method's or optimiser's values where they name one of another class.

    The parser would keep those that both know by the same name: AT would count with the weight of KD, and AdamW take
    the learning rate of SGD. One of the same class keeps what is not given anew.

    Args:
        words: of the command line, which may name files of values.
        optimizer: what the words find, `{"class_path": ...}`.

    Returns:
        The words, with more between them.
    """
    classes = {"method": _classes(None), "optimizer": _classes(optimizer)}
    result = []
    for word, after in zip(words, [*words[1:], ""], strict=False):
        for option, value in _values(word, after):
            given = _classes(value)
            if given and classes[option] and given != classes[option]:
                result.append(f"--{option}={_NONE[option]}")
            classes[option] = classes[option] if given is None else given
        result.append(word)
    return result


def _values(word: str, after: str) -> Iterator[tuple[str, Any]]:
    """Yield the methods and optimisers that a word names, itself or in a file."""
    option, equals, value = word.partition("=")
    text = value if equals else after
    if option == "--config" and Path(text).is_file():
        values = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
        yield from ((name, value) for name, value in values.items() if name in _NONE)
    elif option[2:] in _NONE:
        with suppress(yaml.YAMLError):  # of which the parser complains
            yield option[2:], yaml.safe_load(text)


def _classes(value: Any) -> tuple[str, ...] | None:
    """Return the classes of a method, of several, or of an optimiser; () for none, None if the value does not say."""
    if isinstance(value, list):
        found = [_classes(one) for one in value]
        return tuple(name for one in found for name in one or ())
    if isinstance(value, Mapping):
        value = value.get("class_path", "")
    if value is None:
        return ()
    return (str(value).rpartition(".")[2],) if value else None
