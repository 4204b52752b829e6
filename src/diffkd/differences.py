"""In what two sets of recorded values differ, as a person would say it."""

import operator
from collections.abc import Callable, Mapping
from typing import Any


def differences(
    stored: Any, given: Any, name: str = "", *, same: Callable[[Any, Any], bool] = operator.eq
) -> list[str]:
    """Name the values in which two nested mappings differ.

    Args:
        stored: what was recorded.
        given: what it is compared with. A key that one side lacks is None there.
        name: of the two, the beginning of the dotted names.
        same: whether two values that are not both mappings are equal.

    >>> differences({"data": {"seed": 0}}, {"data": {"seed": 1}})
    ['data.seed is 0 there, 1 here']
    """
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        keys = [*stored, *(key for key in given if key not in stored)]
        parts = (
            differences(stored.get(key), given.get(key), f"{name}.{key}" if name else str(key), same=same)
            for key in keys
        )
        return [one for part in parts for one in part]
    return [] if same(stored, given) else [f"{name} is {stored!r} there, {given!r} here"]
