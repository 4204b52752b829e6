"""Whether the methods of a run serve its task, said before anything is trained."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from diffkd.distiller import Distiller
from diffkd.matching import attribute_of
from diffkd.tasks.data_facts import DataFacts, TaskName
from diffkd.tasks.describe import factory_of
from diffkd.teacher_head import pooled_classifier

INSTEAD: Mapping[TaskName, str] = {
    "classification": "DiffKD, FitNet, CRD or ReviewKD for features, KD, DKD or DIST for logits",
    "segmentation": "DiffKD, FitNet, CWD or CIRKD for features, DiffKD, KD or DIST for class maps",
    "detection": "DiffKD, FitNet, FGD or MGD for the feature pyramid, BoxKD for the outputs",
}
_GIVEN: Mapping[TaskName, frozenset[str]] = {
    "classification": frozenset({"labels", "indices", "teacher_head"}),
    "segmentation": frozenset({"labels", "indices"}),
    "detection": frozenset({"boxes", "indices"}),
}


def inner_methods(method: Any) -> dict[str, Any]:
    """Return the methods that a factory was given as keyword arguments, by their names."""
    method = factory_of(method)
    keywords = method.keywords if isinstance(method, partial) else {}
    return {
        name: value
        for name, value in keywords.items()
        if callable(value) and any(attribute_of(factory_of(value), word, None) for word in ("wants", "needs"))
    }


def check_methods(methods: Any, data: DataFacts) -> None:
    """Raise ValueError if one of several methods or factories, or one inside of it, is not for the data's task."""
    for method in _all(methods):
        tasks = attribute_of(method, "tasks", None)
        if tasks is not None and data.task not in tasks:
            name = attribute_of(method, "__name__", type(method).__name__)
            raise ValueError(
                f"{name} is for {' and '.join(sorted(tasks))}, the data are for {data.task}: take {INSTEAD[data.task]}"
            )


def check_needs(distiller: Distiller, data: DataFacts) -> None:
    """Raise ValueError if a method needs what the data do not give: of their task, whole images, or several."""
    for name, (_, theirs), method in zip(distiller.names, distiller.readers, distiller.methods, strict=True):
        needs = frozenset(getattr(method, "needs", ()))
        who = f"{type(method).__name__} of pair '{name}'"
        if missing := sorted(needs - _GIVEN[data.task]):
            otherwise = "; on the class map itself it may need none" if data.task == "segmentation" else ""
            raise ValueError(
                f"{who} needs {', '.join(missing)}, which data for {data.task} do not give{otherwise}: "
                f"take {INSTEAD[data.task]}"
            )
        least = max(getattr(part, "least_batch", 1) for part in method.modules())
        if data.batch_size is not None and data.batch_size < least:
            raise ValueError(
                f"{who} relates the images of a batch to one another, and learns nothing from batches of "
                f"{data.batch_size}: give --data.batch_size {least} or more"
            )
        if "labels" in needs and (data.mixup or data.cutmix):
            raise ValueError(
                f"{who} needs the class of each image, but the data mix them (mixup={data.mixup}, cutmix="
                f"{data.cutmix}): set both to 0, or take a method without labels, such as DiffKD, KD or DIST"
            )
        if "teacher_head" in needs:
            try:
                pooled_classifier(distiller.teacher, theirs.shapes[0].channels)
            except ValueError as error:
                reason = str(error).partition(":")[0]
                raise ValueError(
                    f"{who} needs the teacher's classifier, but {reason}; pair what its last linear layer is given"
                ) from error


def _all(methods: Any) -> Iterator[Any]:
    for method in methods:
        if method is not None:
            yield factory_of(method)
            yield from _all(inner_methods(method).values())
