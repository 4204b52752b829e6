"""Loading of weights into models of libraries, with the libraries' own converters for older formats."""

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.files.fitting import Report, load_backbone, load_weights
from diffkd.models.extras import require

# Where a detector or segmenter keeps its backbone, the innermost first.
_BACKBONES = ("backbone.body", "encoder.model", "backbone", "encoder")
_OF_TIMM = re.compile(r"(?:timm/|/tu-)(.+)$")
_AUXILIARY = re.compile(r"^(\w+\.)?(aux|AuxLogits|auxiliary)")
# As torchvision renames the entries of its first DenseNets.
_DENSE_LAYER = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")


def fill(
    model: nn.Module,
    weights: str | Path,
    *,
    key: str | None = None,
    wider: Callable[[], nn.Module] | None = None,
    beside: Collection[str] | None = None,
) -> Report:
    """Load a file of weights into a model, as :func:`~diffkd.files.fitting.load_weights` does.

    Args:
        model: receives them in place.
        weights: the file.
        key: prefix of the weights' names, if the file holds several sets.
        wider: builds the same model for one class more, to detect the layers that depend on the classes. These, and
            auxiliary heads, keep their weights if the file has none or others. None: the file must have them.
        beside: entries of a classifier that was taken out of the model; None: it is whole.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`.

    Warns:
        UserWarning: if layers keep their weights.
    """

    def head() -> frozenset[str]:
        auxiliary = {name for name in model.state_dict() if _AUXILIARY.match(name)}
        if wider is None:
            return frozenset(auxiliary)
        with same_draws():
            return frozenset(auxiliary) | frozenset(class_entries(model, wider()))

    heads = None if wider is None else head
    return load_weights(model, weights, key=key, head=heads, convert=library_names, beside=beside)


def fill_backbone(model: nn.Module, name: str, weights: str | Path, *, key: str | None = None) -> Report:
    """Load a classifier's file into the backbone of a detector or segmenter; its head is left out.

    Args:
        model: receives the weights in place.
        name: by which it was built, such as "fcos/timm/NAME" or "smp/unet/resnet18".
        weights: file of a classifier with this backbone: of timm, torchvision or a run of this package.
        key: prefix of the weights' names, if the file holds several sets.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the model has no backbone of its own, or the file lacks entries of it or is of a deeper one.
    """
    parts = dict(model.named_modules())
    body = next((parts[place] for place in _BACKBONES if place in parts), None)
    if body is None or name.startswith("hf/"):
        raise ValueError(
            f"model '{name}' has no backbone that could be filled by itself: give weights of the whole, or a model "
            "of torchvision, smp or timm"
        )
    found = _OF_TIMM.search(name)
    of_timm = None if found is None else found[1]

    def convert(body: nn.Module, names: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return _flattened(body, names if of_timm is None else _by_timm(of_timm, names))

    @cache
    def entries() -> frozenset[str]:
        timm = require("timm", "train", f"weights of '{name}'")
        with same_draws():
            return frozenset(entry.replace(".", "_") for entry in timm.create_model(of_timm).state_dict())

    def known(entry: str) -> bool:
        return entry.removeprefix("model.").replace(".", "_") in entries()

    return load_backbone(body, weights, key=key, convert=convert, known=None if of_timm is None else known)


def _flattened(body: nn.Module, names: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return weights under the names of a network of timm that returns features: stages.0 is stages_0 there.

    Entries that the network lacks in a part that it has, such as further blocks, keep their place in it.
    """
    places = {own.removeprefix("model.").replace(".", "_"): own for own in body.state_dict()}
    sets: dict[str, dict[str, Tensor]] = {}
    for name, value in names.items():
        parts = name.split(".", 12)
        for cut in range(len(parts)):
            if own := places.get(".".join(parts[cut:]).replace(".", "_")):
                sets.setdefault(".".join(parts[:cut]), {})[own] = value
    most = max(map(len, sets.values()), default=0)
    whole = [prefix for prefix, one in sets.items() if len(one) == most]
    if len(whole) != 1:
        return None
    tops = {own.partition(".")[0] for own in body.state_dict()}
    start = f"{whole[0]}." if whole[0] else ""
    further: dict[str, Tensor] = {}
    for name, value in names.items():
        parts = name.removeprefix(start).split(".", 12)
        if not name.startswith(start) or ".".join(parts).replace(".", "_") in places:
            continue
        for cut in range(1, len(parts)):
            if (top := "_".join(parts[:cut])) in tops:
                further[".".join((top, *parts[cut:]))] = value
    return sets[whole[0]] | further


def _by_timm(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the current names of a model of timm; as they are if it knows no other form of them."""
    timm = require("timm", "train", f"weights of '{name}'")
    with same_draws():
        renamed = library_names(timm.create_model(name), weights)
    return weights if renamed is None else renamed


def class_entries(model: nn.Module, wider: nn.Module) -> dict[str, int]:
    """Return the entries of a model that grow with the number of classes, and by how many rows for each.

    Args:
        model: for K classes.
        wider: the same for K + 1.
    """
    theirs = wider.state_dict()
    return {
        name: len(theirs[name]) - len(value)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and value.ndim and name in theirs and len(theirs[name]) > len(value)
    }


def reorder_classes(model: nn.Module, wider: nn.Module, order: Sequence[int]) -> None:
    """Reorder the classes of a model in place: the new score i is the old score `order[i]`.

    Args:
        model: for K classes.
        wider: the same for K + 1.
        order: K numbers.

    Raises:
        ValueError: if its layers do not have one row for each class.
    """
    growing = class_entries(model, wider)
    own = model.state_dict()
    if not growing or any(rows != 1 for rows in growing.values()):
        raise ValueError(
            f"the classes of {type(model).__name__} cannot be brought into another order, since its layers do not have "
            "one row for each: give the data its order, or pair features alone"
        )
    with torch.no_grad():
        for name in growing:
            own[name][: len(order)] = own[name][list(order)].clone()


@contextmanager
def same_draws() -> Iterator[None]:
    """Restore the state of the random generators after building models for comparison in this context."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def library_names(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return weights under the current names of a library's model, None for other models.

    Args:
        model: of timm, torchvision, transformers, or any other.
        weights: by their saved names.
    """
    module = type(model).__module__
    inner = getattr(model, "model", None)
    if module.startswith("timm.models."):
        convert = getattr(sys.modules[module], "checkpoint_filter_fn", None)
        return None if convert is None else _converted(lambda: convert(dict(weights), model))
    if module == "torchvision.models.densenet":
        return {_DENSE_LAYER.sub(r"\1\2", name): value for name, value in weights.items()}
    if module.startswith("transformers."):
        return _converted(lambda: _by_transformers(model, weights))
    if isinstance(inner, nn.Module) and type(inner).__module__.startswith("transformers."):
        found = _converted(lambda: _by_transformers(inner, weights))
        return None if found is None else {f"model.{name}": value for name, value in found.items()}
    return None


def _converted(convert: Callable[[], Any]) -> dict[str, Tensor] | None:
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            found = convert()
    except Exception:  # a converter may raise anything for weights of another model
        return None
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _by_transformers(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Load weights, also under older names, by transformers into a model of the same configuration."""
    logging: Any = require("transformers.utils.logging", "hf", "a file of transformers")

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        made, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=dict(weights),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    mismatched = {one if isinstance(one, str) else one[0] for one in report["mismatched_keys"]}
    unknown = {*report["missing_keys"], *mismatched}
    found = {name: value for name, value in made.state_dict().items() if name not in unknown}
    for name in mismatched:  # their shapes are reported
        if name in weights:
            found[name] = weights[name]
    return found | {name: weights[name] for name in report["unexpected_keys"] if name in weights}
