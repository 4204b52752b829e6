"""Many names in one message."""

from collections.abc import Sequence

_SPELLED_OUT = 5


def quoted(names: Sequence[object]) -> str:
    """Return names for a message, the first five of many.

    >>> quoted("abcdefg")
    "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    more = f" and {len(names) - _SPELLED_OUT} more" if len(names) > _SPELLED_OUT else ""
    return ", ".join(map(repr, names[:_SPELLED_OUT])) + more
