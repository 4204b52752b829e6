"""Loading of weights into a network: removes name prefixes of trainers and wrappers, and reports entries not loaded."""

import copy
import re
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.files.prefixes import UNINITIALIZED, best_prefix, common_beginnings, shape_of, without_wrapper_parts
from diffkd.files.weights import (
    Contents,
    choose_key,
    format_names,
    is_averaged,
    no_state_dict,
    read_contents,
    shard_hint,
    unwrap,
    without_wrappers,
)

Convert = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor] | None]

# Buffers that a network computes when it is built; a file may lack them or have additional ones.
_DERIVED = re.compile(
    r"(^|\.)(num_batches_tracked|relative_position_index|rel_pos_index|relative_coords_table|position_ids|attn_mask|"
    r"n_averaged|total_ops|total_params)$"
)
# Parts used only in training: auxiliary heads, and losses and metrics that are modules.
_TRAINING_ONLY = re.compile(
    r"^((\w+\.)?(aux\w*|AuxLogits|auxiliary\w*)|criterion\w*|\w*loss(es|_fn|_func|_function|_module)?|\w*metrics?)\."
)
_DIGITS = "0123456789"
_REPORTS: "weakref.WeakKeyDictionary[nn.Module, Report]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Report:
    """Report of what was loaded from a file of weights.

    Attributes:
        path: the file.
        taken: number of tensors loaded.
        key: prefix of their names in the file, "" for none.
        others: keys of other weights of the same network in the file, not loaded.
        left_out: names of tensors not loaded, and objects not read.
        random: entries of the network missing in the file, which keep their values: the classifier.
        of_other_shape: those of `random` that have another shape in the file.
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
        """Whether the file had exactly the network's entries."""
        return not (self.key or self.others or self.left_out or self.random or self.notes)

    def __str__(self) -> str:
        """Return the report in one line."""
        where = f" under {self.key!r}" if self.key else ""
        if is_averaged(self.key) and self.others:
            where += ", the average"
        parts = [f"{self.taken} tensors{where}"]
        if self.others:
            parts.append(f"not taken: {format_names(self.others)} (choose by its key)")
        parts.extend(self.notes)
        if self.left_out:
            parts.append(f"left out: {_few(self.left_out)}")
        if self.random:
            parts.append(f"starts from random weights: {_few(self.random)}")
        return f"{self.path}: {'; '.join(parts)}"


def report_of(model: nn.Module) -> Report | None:
    """Return the report of the last :func:`load_weights` for a model, None if nothing was loaded."""
    return _REPORTS.get(unwrap(model))


@dataclass
class Fit:
    """Result of matching the weights of a file with a network.

    Attributes:
        filled: the network's entries with their new values.
        missing: entries that the file lacks.
        unexpected: names in the file that the network lacks.
        shapes: entries with another shape, with the file's tensors.
        key: prefix of the names.
        others: keys of other weights of the same network.
        outside: names without the key as prefix.
        notes: conversions.
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
        """Number of mismatched entries, except those that a network computes itself."""
        lacking = [name for name in self.missing if not _DERIVED.search(name)]
        return len(lacking) + len(self.unexpected) + len(self.shapes)


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    head: Callable[[], frozenset[str]] | None = None,
    convert: Convert | None = None,
    beside: Collection[str] | None = None,
) -> Report:
    """Load a file of tensors into `model`, strictly: either all entries of the network are loaded, or none.

    Prefixes of trainers and wrappers in the file's names, such as "state_dict.model." or "module.", are removed; the
    `load_state_dict` hooks of libraries for older files are used. Losses, metrics and auxiliary heads that the network
    lacks are left out; other unexpected entries are errors, since the file is then of another network. If the
    classifier may be another (`head`) or is not wanted (`beside`), what the file has in its place is left out too: the
    entries below it, and those of top-level parts that the network lacks, such as the projection head of
    self-supervised training. A classifier beside the network, such as "head.fc.weight" beside "backbone.conv1.weight",
    is taken as its own.

    Args:
        model: receives the weights in place.
        path: as for :func:`~diffkd.files.weights.read_weights`.
        key: prefix of the weights to load, if several in the file fit. None: the only ones; of raw and averaged (EMA)
            weights, the averaged ones.
        head: returns the entries that depend on the number of classes; they may keep their values, with a warning, if
            the file lacks them or has another number of classes. None: no entry may.
        convert: converts weights of another format of a library to the network's names; returns None for an unknown
            format.
        beside: entries of a classifier that the network lacks; None: it lacks none.

    Returns:
        The report; `str` gives one line.

    Raises:
        FileNotFoundError, ValueError: as :func:`~diffkd.files.weights.read_weights`; ValueError also if entries are
            missing, unexpected or of another shape, or parameters are not finite. The message lists them.

    Warns:
        UserWarning: if entries of the network keep their values.
    """
    model = unwrap(model)
    contents = read_contents(path)
    own = model.state_dict()
    fit = fit_contents(model, path, contents, key, convert)
    lenient = frozenset[str]() if head is None or not (fit.missing or fit.shapes or fit.unexpected) else head()
    missing = [name for name in fit.missing if not (name in lenient or _may_lack(name, fit, own))]
    shapes = [name for name in fit.shapes if name not in lenient]
    unexpected = [name for name in fit.unexpected if not (_DERIVED.search(name) or _TRAINING_ONLY.match(name))]
    if head is not None or beside is not None:
        unexpected = _inside(unexpected, own, lenient.union(beside or ()))
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
        # Some of each kind, since a different prefix shows only in pairs.
        shown = [line for lines in described for line in lines[:3]]
        count = sum(map(len, described))
        more = f" and {count - len(shown)} more" if count > len(shown) else ""
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(shown)}{more}; "
            "build the model that the file was saved from (same name, number of classes and input channels)"
            f"{shard_hint(path)}"
        )
    _check_finite(model, path, fit)
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
    left = (*_grouped(fit.outside, fit.key), *_grouped(fit.unexpected), *contents.skipped)
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


def load_backbone(
    body: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    convert: Convert | None = None,
    known: Callable[[str], bool] | None = None,
) -> Report:
    """Load a file of tensors into a part of its network: all entries of the part; other parts are left out.

    Args:
        body: receives the weights in place.
        path: as for :func:`~diffkd.files.weights.read_weights`.
        key: as for :func:`load_weights`.
        convert: likewise.
        known: whether the whole network has an entry, for a body that lacks the network's last layers. None: it has
            them all.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_weights`; entries are unexpected only in the body's own top-level
            parts.
    """
    body = unwrap(body)
    contents = read_contents(path)
    own = body.state_dict()
    fit = fit_contents(body, path, contents, key)
    if convert is not None and (fit.shapes or any(not _may_lack(name, fit, own) for name in fit.missing)):
        fit = fit_contents(body, path, contents, key, convert)
    missing = [name for name in fit.missing if not _may_lack(name, fit, own)]
    unexpected = [name for name in _inside(fit.unexpected, own) if not _DERIVED.search(name)]
    if known is not None:
        unexpected = [name for name in unexpected if not known(name)]
    if missing or unexpected or fit.shapes:
        described = [f"missing {name}" for name in missing[:3]]
        described += [f"unexpected {name}" for name in unexpected[:3]]
        described += [
            f"{name} is {tuple(value.shape)} there, {shape_of(own[name])} here"
            for name, value in list(fit.shapes.items())[:3]
        ]
        count = len(missing) + len(unexpected) + len(fit.shapes) - len(described)
        raise ValueError(
            f"{path} does not fit the backbone {type(body).__name__}: {'; '.join(described)}"
            f"{f' and {count} more' if count > 0 else ''}; give a file of a classifier with this backbone"
            f"{shard_hint(path)}"
        )
    _check_finite(body, path, fit)
    body.load_state_dict(OrderedDict(fit.filled), strict=False)
    left = (*_grouped(fit.outside, fit.key), *_grouped(fit.unexpected), *contents.skipped)
    return Report(str(path), len(fit.filled), fit.key, fit.others, left, notes=tuple(fit.notes))


def fit_contents(
    model: nn.Module, path: str | Path, contents: Contents, key: str | None = None, convert: Convert | None = None
) -> Fit:
    """Find the best match of a file's tensors with a network, without changing it.

    Args:
        model: the network.
        path: path of the file, for messages.
        contents: contents of the file.
        key: as for :func:`load_weights`.
        convert: likewise.

    Raises:
        ValueError: if there are no tensors, the key does not exist, or several sets of weights fit equally well.
    """
    if not contents.tensors:
        raise ValueError(no_state_dict(path, contents))
    own = model.state_dict()
    best, others = best_prefix(path, own, contents, key)
    fits = []
    prefix, added, weights = best
    fit = _try(model, {added + name: value for name, value in weights.items()})
    inside = f"{prefix}." if prefix else ""
    fit.key, fit.others = prefix, others
    names = without_wrapper_parts(own, contents.tensors)
    fit.outside = [name for name in names if not name.startswith(inside)]
    if others:
        fit.outside = [name for name in fit.outside if not name.startswith(tuple(f"{one}." for one in others))]
    fit = _with_head_beside(model, fit, names, {added + name: value for name, value in weights.items()})
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


def _with_head_beside(model: nn.Module, fit: Fit, tensors: Mapping[str, Tensor], weights: dict[str, Tensor]) -> Fit:
    """Take the one layer that is missing from beside the network: "head.fc.weight" beside "backbone.conv1.weight"."""
    missing = [name for name in fit.missing if not _DERIVED.search(name)]
    layers = {name.rpartition(".")[0] for name in missing}
    layer = next(iter(layers), "")
    parent = fit.key.rpartition(".")[0]
    start = f"{parent}." if parent else ""
    places = {
        name.removesuffix(f".{missing[0]}")
        for name in fit.outside
        if layer and name.startswith(start) and name.endswith(f".{missing[0]}")
    }
    if not fit.key or len(layers) != 1 or len(places) != 1:
        return fit
    place = places.pop()
    found = {name: tensors[f"{place}.{name}"] for name in missing if f"{place}.{name}" in tensors}
    if len(found) < len(missing):
        return fit
    whole = _try(model, weights | found)
    taken = {f"{place}.{name}" for name in found}
    whole.key, whole.others, whole.notes = fit.key, fit.others, [f"{layer} from {place}.{layer}"]
    whole.outside = [name for name in fit.outside if name not in taken]
    return whole


def _inside(names: list[str], own: Mapping[str, Any], head: Collection[str] = ()) -> list[str]:
    """Return those names of a file that lie in a part of the network, as further layers of a deeper one do.

    Args:
        names: that the network lacks.
        own: the network's entries.
        head: entries of the classifier, which is no such part; the network may have them or not.
    """
    layers = tuple(f"{layer}." for layer in {name.rpartition(".")[0] for name in head} if layer)
    trunk = [name for name in own if name not in head]
    # A network may be nested in others, but a single layer is not.
    levels = [
        level for level in common_beginnings(trunk) if any("." in name.removeprefix(level) for name in trunk)
    ] or [""]

    def is_inside(name: str) -> bool:
        if name in head or name.startswith(layers):
            return False
        level = next((one for one in reversed(levels) if name.startswith(one)), "")
        parts = {one.removeprefix(level).partition(".")[0].rstrip(_DIGITS) for one in trunk}
        # "layer5" lies in the network too if that has a "layer4".
        return name.removeprefix(level).partition(".")[0].rstrip(_DIGITS) in parts

    return [name for name in names if is_inside(name)]


def _other_names(
    path: str | Path, contents: Contents, prefix: str, weights: dict[str, Tensor], key: str | None
) -> Iterator[dict[str, Tensor]]:
    """Yield the weights with the names a library may expect: below the prefix found, and below the file's key."""
    yield dict(weights)
    with suppress(ValueError):
        base = choose_key(path, contents.keys, key)
        if base != prefix:
            yield without_wrappers(contents.under(base))


def _try(model: nn.Module, weights: dict[str, Tensor]) -> Fit:
    """Load weights into a copy of the network on the meta device, so that the hooks of libraries run."""
    own = model.state_dict()
    best: Fit | None = None
    # First as a current file, then without version metadata, which hooks treat as an old file or refuse.
    for metadata in (getattr(own, "_metadata", None), None):
        try:
            fit = _through_hooks(_without_memory(model), own, weights, metadata)
        except Exception:  # a model's hooks and copying may raise anything; then match by name
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
    """Return a copy of a network with parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for value in (*model.parameters(), *model.buffers()):
        if isinstance(value, UNINITIALIZED):
            continue
        empty = torch.empty_like(value, device="meta")
        memo[id(value)] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _may_lack(name: str, fit: Fit, own: Mapping[str, Any]) -> bool:
    """Whether an entry may be missing: computed by the network, or tied to a loaded entry."""
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


def _check_finite(model: nn.Module, path: str | Path, fit: Fit) -> None:
    broken = [
        name for name, _ in model.named_parameters() if name in fit.filled and not fit.filled[name].isfinite().all()
    ]
    # Buffers may hold infinities, as masks do, but no NaN, as the statistics of a diverged training do.
    broken += [name for name, _ in model.named_buffers() if name in fit.filled and _has_nan(fit.filled[name])]
    if broken:
        raise ValueError(f"{path} holds NaN or infinity in {', '.join(broken[:3])}: fetch or save it again")


def _has_nan(value: Tensor) -> bool:
    return value.is_floating_point() and bool(value.isnan().any())


def _converted(value: Any, own: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and isinstance(own, Tensor)
        and value.is_floating_point()
        and shape_of(own) is not None
        and value.dtype != own.dtype
    )


def _grouped(names: list[str], key: str = "") -> list[str]:
    """Return names for a message; many names below one part beside `key` become the part and their count."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts, inside = name.split("."), key.split(".")
        same = next((at for at, pair in enumerate(zip(parts, inside, strict=False)) if pair[0] != pair[1]), len(inside))
        groups.setdefault(".".join(parts[: same + 1]), []).append(name)
    return [found[0] if len(found) == 1 else f"{group}.* ({len(found)} tensors)" for group, found in groups.items()]


def _few(names: tuple[str, ...], count: int = 6) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
