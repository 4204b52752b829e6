"""Whether teacher and data mean the same by their class scores."""

import warnings
from pathlib import Path

from diffkd.distiller import Distiller
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.same_data import first_difference
from diffkd.tasks.setup import find_weights
from diffkd.tasks.student_file import read_card


def check_teacher_classes(distiller: Distiller, weights: str | Path, data: DataFacts) -> None:
    """Compare the names of the classes of teacher and data, where their scores are paired.

    Warns of other names, which may be those of the same classes.

    Args:
        distiller: with its pairs.
        weights: the teacher's; their card says its classes.
        data: what the student sees.

    Raises:
        ValueError: if the names are the same in another order.
    """
    theirs = read_card(find_weights(weights)).get("classes") or ()
    other = first_difference(theirs, data.classes)
    if len(theirs) != len(data.classes) or other is None or not _pairs_scores(distiller):
        return
    if sorted(theirs) == sorted(data.classes):
        raise ValueError(
            f"the teacher {weights} has the classes of the data in another order: {other}. Give the data that order, "
            "or pair features alone"
        )
    warnings.warn(
        f"the teacher {weights} names its classes otherwise than the data: {other}. If they are others, or in another "
        "order, its scores teach nonsense: pair features alone then",
        stacklevel=2,
    )


def _pairs_scores(distiller: Distiller) -> bool:
    scores = (
        shape.role == "logits" or name.endswith("[cls_logits]")
        for _, theirs in distiller.readers
        for name, shape in zip(theirs.names, theirs.shapes, strict=True)
    )
    return any(scores)
