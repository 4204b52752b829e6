"""Classes that a list of labels lacks."""

from collections.abc import Iterable, Sequence


def absent_classes(labels: Iterable[int], classes: Sequence[str]) -> list[str]:
    """Return the names of the classes that no label stands for, in their order.

    >>> absent_classes([0, 2, 2], ["cat", "dog", "bird"])
    ['dog']
    """
    present = set(labels)
    return [name for label, name in enumerate(classes) if label not in present]
