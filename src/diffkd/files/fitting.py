"""Weights of a file into a network: the names of trainers and wrappers taken off, and nothing left random unsaid."""

import copy
import re
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.files.prefixes import UNINITIALIZED, best_prefix, cleaned, shape_of
from diffkd.files.weights import (
    Contents,
    choose_key,
    is_averaged,
    listed,
    read_contents,
    shard_hint,
    unwrap,
    without_wrappers,
)

Convert = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor] | None]

# Buffers that a network computes when it is built, so that a file may lack them or have them besides.
_DERIVED = re.compile(
    r"(^|\.)(num_batches_tracked|relative_position_index|rel_pos_index|relative_coords_table|position_ids|attn_mask|"
    r"n_averaged|total_ops|total_params)$"
)
# What a training alone needs: second heads, and losses and metrics that are modules.
_TRAINING_ONLY = re.compile(
    r"^((\w+\.)?(aux\w*|AuxLogits|auxiliary\w*)|criterion\w*|\w*loss(es|_fn|_func|_function|_module)?|\w*metrics?)\."
)
_REPORTS: "weakref.WeakKeyDictionary[nn.Module, Report]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Report:
    """What was taken from a file of weights.

    Attributes:
        path: the file.
        taken: how many tensors.
        key: what their names began with in the file, "" for nothing.
        others: keys of other weights of the same network in the file, which were not taken.
        left_out: names of tensors that were not taken, and objects that were not read.
        random: entries of the network that the file does not have, and that stay as they were: the classifier.
        of_other_shape: those of `random` that the file has in another shape.
        notes: conversions.
    """

    path: str
    taken: int
    key: str = ""
    others: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    of_other_shape: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the file held exactly the network's own entries."""
        return not (self.key or self.others or self.left_out or self.random or self.notes)

    def __str__(self) -> str:
        """Return all of it in one line."""
        where = f" under {self.key!r}" if self.key else ""
        if is_averaged(self.key) and self.others:
            where += ", the average"
        parts = [f"{self.taken} tensors{where}"]
        if self.others:
            parts.append(f"not taken: {listed(self.others)} (choose by its key)")
        parts.extend(self.notes)
        if self.left_out:
            parts.append(f"left out: {_few(self.left_out)}")
        if self.random:
            parts.append(f"starts from random weights: {_few(self.random)}")
        return f"{self.path}: {'; '.join(parts)}"


def report_of(model: nn.Module) -> Report | None:
    """Return what :func:`load_weights` last took for a model, None if nothing was loaded."""
    return _REPORTS.get(unwrap(model))


@dataclass
class Fit:
    """How the weights of a file fit a network.

    Attributes:
        filled: the network's entries with their new values.
        missing: entries that the file lacks.
        unexpected: names in the file that the network lacks.
        shapes: entries of another shape, with the file's tensors.
        key: what the names began with.
        others: keys of other weights of the same network.
        outside: names that do not begin with the key.
        notes: what was converted.
    """

    filled: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, Tensor]
    key: str = ""
    others: tuple[str, ...] = ()
    outside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> int:
        """How many entries do not fit, of those that a network cannot compute itself."""
        lacking = [name for name in self.missing if not _DERIVED.search(name)]
        return len(lacking) + len(self.unexpected) + len(self.shapes)


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    head: Callable[[], frozenset[str]] | None = None,
    convert: Convert | None = None,
) -> Report:
    """Load a file of tensors into `model`, strictly: every entry of the network is filled, or nothing is changed.

    The names in the file may begin with what trainers and wrappers put in front, such as "state_dict.model." or
    "module."; the hooks with which libraries read their older files are used. Left out are losses, metrics and
    auxiliary heads that the network does not have; other unexpected entries are errors, since the file is then of
    another network.

    Args:
        model: receives the weights in place.
        path: as for :func:`~diffkd.files.weights.read_weights`.
        key: of the weights to take, where a file holds several that fit: what their names begin with. None: the only
            ones; of those of a training and their average, the average.
        head: returns the entries that depend on the number of classes, and that may stay as they are if the file lacks
            them or has those of other classes; a warning then names them. None: none may.
        convert: returns the weights under the network's own names, if they are those of a library's other format; None
            if it knows nothing of them.

    Returns:
        What was taken, in one line as a text.

    Raises:
        FileNotFoundError, ValueError: as :func:`~diffkd.files.weights.read_weights`; ValueError also if entries are
            missing, unexpected or of another shape, or parameters are not finite. The message lists them.

    Warns:
        UserWarning: if entries of the network stay as they are.
    """
    model = unwrap(model)
    contents = read_contents(path)
    own = model.state_dict()
    fit = fit_contents(model, path, contents, key, convert)
    lenient = frozenset[str]() if head is None or not (fit.missing or fit.shapes) else head()
    missing = [name for name in fit.missing if not (name in lenient or _may_lack(name, fit, own))]
    shapes = [name for name in fit.shapes if name not in lenient]
    unexpected = [name for name in fit.unexpected if not (_DERIVED.search(name) or _TRAINING_ONLY.match(name))]
    kinds = [
        f"{name} is of {value.dtype} there, {own[name].dtype} here"
        for name, value in fit.filled.items()
        if isinstance(own.get(name), Tensor) and own[name].is_floating_point() and not value.is_floating_point()
    ]
    inside = f"{fit.key}." if fit.key else ""
    if missing or unexpected or shapes or kinds:
        described = [
            [f"missing {name}" for name in missing],
            [f"unexpected {inside}{name}" for name in unexpected],
            [f"{name} is {tuple(fit.shapes[name].shape)} there, {shape_of(own[name])} here" for name in shapes],
            kinds,
        ]
        # Of each kind, since another prefix is seen in pairs only.
        shown = [line for lines in described for line in lines[:3]]
        count = sum(map(len, described))
        more = f" and {count - len(shown)} more" if count > len(shown) else ""
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(shown)}{more}; "
            "build the model that the file was saved from (same name, number of classes and input channels)"
            f"{shard_hint(path)}"
        )
    broken = [name for name, _ in model.named_parameters() if name in fit.filled and not _finite(fit.filled[name])]
    if broken:
        raise ValueError(f"{path} holds NaN or infinity in {', '.join(broken[:3])}: fetch or save it again")
    state = OrderedDict(fit.filled)
    state._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined]
    model.load_state_dict(state, strict=False)
    random = tuple(name for name in (*fit.missing, *fit.shapes) if name in lenient)
    widths = {
        str(value.dtype).removeprefix("torch.") for name, value in fit.filled.items() if _converted(value, own[name])
    }
    notes = [*fit.notes, *([f"converted from {', '.join(sorted(widths))}"] if widths else [])]
    if lacking := [name for name in fit.missing if name.endswith("num_batches_tracked")]:
        notes.append(f"{len(lacking)} num_batches_tracked, which it lacks, stay 0")
    left = (*_grouped(fit.outside), *_grouped(fit.unexpected), *contents.skipped)
    report = Report(
        str(path),
        len(fit.filled),
        fit.key,
        fit.others,
        left,
        random,
        tuple(name for name in random if name in fit.shapes),
        tuple(notes),
    )
    _REPORTS[model] = report
    if random:
        warnings.warn(
            f"{path}: {', '.join(random)} of {type(model).__name__} start from random weights, since the file has none "
            "for so many classes",
            stacklevel=4,
        )
    return report


def fit_contents(
    model: nn.Module, path: str | Path, contents: Contents, key: str | None = None, convert: Convert | None = None
) -> Fit:
    """Return how the tensors of a file fit a network best, changing nothing.

    Args:
        model: the network.
        path: of the file, for messages.
        contents: of the file.
        key: as for :func:`load_weights`.
        convert: likewise.

    Raises:
        ValueError: if there are no tensors, no such key, or several weights that fit alike.
    """
    if not contents.tensors:
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors); save model.state_dict()")
    own = model.state_dict()
    best, others = best_prefix(path, own, contents, key)
    fits = []
    prefix, added, weights = best
    fit = _try(model, {added + name: value for name, value in weights.items()})
    inside = f"{prefix}." if prefix else ""
    fit.key, fit.others = prefix, others
    names = cleaned(own, contents.tensors)
    fit.outside = [name for name in names if not name.startswith(inside)]
    if others:
        fit.outside = [name for name in fit.outside if not name.startswith(tuple(f"{one}." for one in others))]
    fits.append(fit)
    if fit.problems and convert is not None:
        for names in _other_names(path, contents, prefix, weights, key):
            renamed = convert(model, names)
            if renamed is not None:
                other = _try(model, renamed)
                other.key, other.others, other.outside = prefix, others, fit.outside
                other.notes = ["converted by its library from an older or other form"]
                fits.append(other)
    return min(fits, key=lambda one: len(one.missing) + len(one.shapes) + 0.5 * len(one.unexpected))


def _other_names(
    path: str | Path, contents: Contents, prefix: str, weights: dict[str, Tensor], key: str | None
) -> Iterator[dict[str, Tensor]]:
    """Yield the weights as a library may know them: under the prefix found, and under the key of the file."""
    yield dict(weights)
    with suppress(ValueError):
        base = choose_key(path, contents.keys, key)
        if base != prefix:
            yield without_wrappers(contents.under(base))


def _try(model: nn.Module, weights: dict[str, Tensor]) -> Fit:
    """Load weights into a copy of the network without memory, so that the hooks of libraries take part."""
    own = model.state_dict()
    best: Fit | None = None
    # As a file of today, then as one that says nothing of its version, which hooks take for an old one or refuse.
    for metadata in (getattr(own, "_metadata", None), None):
        try:
            fit = _through_hooks(_without_memory(model), own, weights, metadata)
        except Exception:  # whatever a model's own hooks and copying raise; the names decide then
            continue
        if best is None or fit.problems < best.problems:
            best = fit
        if not fit.problems:
            break
    return best if best is not None else _by_name(own, weights)


def _through_hooks(shadow: nn.Module, own: Mapping[str, Any], weights: dict[str, Tensor], metadata: Any) -> Fit:
    before = {name: id(value) for name, value in shadow.state_dict(keep_vars=True).items()}
    known: list[list[str]] = [[], []]

    def note(module: nn.Module, keys: Any) -> None:
        known[0][:], known[1][:] = list(keys.missing_keys), list(keys.unexpected_keys)

    shadow.register_load_state_dict_post_hook(note)  # type: ignore[no-untyped-call]
    state = OrderedDict(weights)
    if metadata is not None:
        state._metadata = copy.deepcopy(metadata)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shadow.load_state_dict(state, assign=True)
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise
    after = shadow.state_dict(keep_vars=True)
    filled = {name: value.detach() for name, value in after.items() if id(value) != before.get(name)}
    missing, unexpected = (list(dict.fromkeys(names)) for names in known)
    open_names = [name for name in own if name not in filled]
    shapes = {
        name: weights[name]
        for name in open_names
        if name in weights and name not in missing and tuple(weights[name].shape) != shape_of(own[name])
    }
    return Fit(filled, [name for name in open_names if name not in shapes], unexpected, shapes)


def _by_name(own: Mapping[str, Any], weights: dict[str, Tensor]) -> Fit:
    same = {name: value for name, value in weights.items() if name in own}
    filled = {name: value for name, value in same.items() if shape_of(own[name]) in (tuple(value.shape), None)}
    return Fit(
        filled,
        [name for name in own if name not in weights],
        [name for name in weights if name not in own],
        {name: value for name, value in same.items() if name not in filled},
    )


def _without_memory(model: nn.Module) -> nn.Module:
    """Return a copy of a network whose parameters and buffers hold no numbers."""
    memo: dict[int, Any] = {}
    for value in (*model.parameters(), *model.buffers()):
        if isinstance(value, UNINITIALIZED):
            continue
        empty = torch.empty_like(value, device="meta")
        memo[id(value)] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _may_lack(name: str, fit: Fit, own: Mapping[str, Any]) -> bool:
    """Whether an entry needs no value of its own: computed by the network, or tied to one that has it."""
    if _DERIVED.search(name):
        return True
    value = own[name]
    if not isinstance(value, Tensor) or shape_of(value) is None or not value.numel():
        return False
    tied = (value.data_ptr(), value.shape, value.stride())
    others = (own[other] for other in fit.filled if other in own)
    return any(
        isinstance(other, Tensor)
        and shape_of(other) is not None
        and (other.data_ptr(), other.shape, other.stride()) == tied
        for other in others
    )


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _converted(value: Any, own: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and isinstance(own, Tensor)
        and value.is_floating_point()
        and shape_of(own) is not None
        and value.dtype != own.dtype
    )


def _grouped(names: list[str]) -> list[str]:
    """Return names for a message, of many under one key the key and their number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [found[0] if len(found) == 1 else f"{group}.* ({len(found)} tensors)" for group, found in groups.items()]


def _few(names: tuple[str, ...], count: int = 6) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
