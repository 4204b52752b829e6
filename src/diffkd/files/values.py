"""Files of values, YAML and JSON, read as plain data: damaged and hostile ones are ValueErrors that name the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# A few aliases can stand for billions of values, which whoever walks through them would visit.
_MOST_VALUES = 100_000
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class TooLargeError(ValueError):
    """Values that are nested too deeply, or that aliases repeat too often."""


def read_yaml(text: str) -> Any:
    """Return the content of a YAML text as numbers, strings, lists and mappings.

    Raises:
        ValueError: if it is no YAML, or a mapping has a key twice; the message is the reason, without a file.
        TooLargeError: if it is nested too deeply, or holds more than 100,000 values, those counted that aliases repeat.
    """
    try:
        content = _loaded(text)
        count = _count(content, {})
    except RecursionError as error:
        raise TooLargeError("its values are nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).replace('in "<unicode string>", ', "").split())) from error
    except (ValueError, OverflowError) as error:  # such as dates of no month
        raise ValueError(f"it holds a value that cannot be read: {error}") from error
    if count > _MOST_VALUES:
        raise TooLargeError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    return content


def read_yaml_file(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ValueError: as :func:`read_yaml`, or if it is no text; the message names the file.
    """
    try:
        return read_yaml(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        kind = TooLargeError if isinstance(error, TooLargeError) else ValueError
        raise kind(f"{path} cannot be read as YAML ({error}): correct it") from error


def read_json_file(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: if it is no JSON, or nested too deeply; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise TooLargeError(f"{path} is no JSON that can be read (it is nested too deeply): write it again") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch or write it again") from error


def _loaded(text: str) -> Any:
    """Return the content of a YAML text; a key that is there twice is an error, where a loader would take the last."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _check_keys(node, set())
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _check_keys(node: Any, known: set[int]) -> None:
    if id(node) in known:
        return
    known.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _check_keys(one, known)
    elif isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            name = (key.tag, key.value)
            if isinstance(key, yaml.ScalarNode) and name in names and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(
                    f"it holds {key.value[:80]!r} twice, the second time in line {key.start_mark.line + 1}"
                )
            if isinstance(key, yaml.ScalarNode):
                names.add(name)
            _check_keys(value, known)


def _count(value: Any, known: dict[int, int]) -> int:
    """Return the number of values in nested mappings and lists; one that holds itself counts once."""
    if not isinstance(value, (Mapping, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = 1
        inside = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_count(one, known) for one in inside)
    return known[id(value)]
