"""Classes that a list of labels lacks, and how messages name them."""

from collections.abc import Iterable, Sequence

_NAMED = 5  # of many names those that a message spells out


def absent_classes(labels: Iterable[int], classes: Sequence[str]) -> list[str]:
    """Return the names of the classes that no label stands for, in their order.

    >>> absent_classes([0, 2, 2], ["cat", "dog", "bird"])
    ['dog']
    """
    present = set(labels)
    return [name for label, name in enumerate(classes) if label not in present]


def quoted(names: Sequence[str]) -> str:
    """Return names for a message, the first five of many.

    >>> quoted("abcdefg")
    "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
