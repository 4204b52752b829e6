"""Whether the data are those that a run began with: the names of their classes, and their samples."""

from collections.abc import Sequence
from typing import Any

from diffkd.differences import differences


def describe_samples(loader: Any) -> dict[str, Any]:
    """Return what can be told of a loader's samples without reading images, None where it cannot be.

    Returns:
        "training images": their number; "digest": of their names and labels in order.
    """
    dataset: Any = getattr(loader, "dataset", None)
    size = len(dataset) if hasattr(dataset, "__len__") else None
    size = getattr(getattr(loader, "sampler", None), "size", size)
    return {"training images": size, "digest": getattr(loader, "digest", None)}


def check_samples(stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise ValueError if the samples of a run are not those that it began with, as far as both sides can tell."""
    known = [name for name in stored if stored[name] is not None and given.get(name) is not None]
    found = differences({name: stored[name] for name in known}, {name: given[name] for name in known})
    if found:
        what = "other names or labels" if found[0].startswith("digest") else found[0]
        raise ValueError(
            f"the data are not those that the run began with ({what}), and their samples would be taken for others: "
            "bring the data back, or give another --out"
        )


def check_classes(stored: Sequence[str], given: Sequence[str]) -> None:
    """Raise ValueError if the classes of a run are not those that it began with; names the first that differs."""
    if (other := first_difference(stored, given)) is not None:
        raise ValueError(
            f"the data have other classes than the run began with: {other}. Name them as they were, or give another "
            "--out"
        )


def first_difference(there: Sequence[str], here: Sequence[str]) -> str | None:
    """Return the first class in which two lists of names differ.

    >>> first_difference(["cat", "dog"], ["cat", "fox"])
    "class 1 is 'dog' there, 'fox' here"
    """
    ours, theirs = ({f"class {index}": str(name) for index, name in enumerate(names)} for names in (here, there))
    return next(iter(differences(theirs, ours)), None)
