"""Name prefixes of weights in files of trainers and wrappers, found by matching the network's own names."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from diffkd.files.weights import Contents, choose_key, format_names, is_averaged, without_wrappers

# Name parts that wrappers add, also in the middle of names.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)
"""Types of uninitialised entries of lazy modules, which have no shape yet."""


def best_prefix(
    path: str | Path, own: Mapping[str, Any], contents: Contents, key: str | None
) -> tuple[tuple[str, str, dict[str, Tensor]], tuple[str, ...]]:
    """Return (prefix in the file, prefix to add, weights without it), and other prefixes that fit equally well."""
    tensors = without_wrapper_parts(own, contents.tensors)
    targets = {added: {name.removeprefix(added) for name in own} for added in common_beginnings(own)}
    votes: dict[tuple[str, str], list[str]] = {}
    for name in tensors:
        for prefix, rest in _splits(name):
            for added, wanted in targets.items():
                if rest in wanted:
                    votes.setdefault((prefix, added), []).append(rest)
    if key is not None:
        tests: tuple[Callable[[str], bool], ...] = (
            lambda prefix: prefix == key,
            lambda prefix: prefix.startswith(f"{key}."),
            lambda prefix: f".{key}." in f".{prefix}.",
        )
        kept = next(
            (chosen for test in tests if (chosen := {one: names for one, names in votes.items() if test(one[0])})), {}
        )
        if not kept:
            most = max(map(len, votes.values()), default=0)
            likely = {prefix for (prefix, _), names in votes.items() if prefix and 2 * len(names) > most}
            known = sorted(likely | set(contents.keys) - {""})
            if key in contents.keys:
                return (key, "", without_wrappers(contents.under(key))), ()
            there = f"; there are {format_names(known)}" if known else ""
            raise ValueError(f"{path} has no weights under the key {key!r}{there}")
        votes = kept
    if not votes:
        base = choose_key(path, contents.keys) if contents.keys else ""
        return (base, "", without_wrappers(contents.under(base))), ()

    def inside(prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}." if prefix else ""
        return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}

    most = max(map(len, votes.values()))
    found: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for (prefix, added), names in sorted(votes.items(), key=lambda one: (one[0][1] != "", one[0][0].count("."))):
        if len(names) == most and prefix not in found:
            weights = inside(prefix)
            found[prefix] = (added, {added + name: weights[name] for name in names})
    if len(found) > 1:
        fitting = {
            prefix: sum(shape_of(own[name]) == tuple(value.shape) for name, value in one.items())
            for prefix, (_, one) in found.items()
        }
        found = {prefix: one for prefix, one in found.items() if fitting[prefix] == max(fitting.values())}
    prefixes = _distinct(found)
    averaged, raw = ([one for one in prefixes if is_averaged(one) is kind] for kind in (True, False))
    pick = prefixes[0]
    if len(averaged) == len(raw) == 1:
        pick = averaged[0]
    elif len(prefixes) > 1 and (prefixes[0] != "" or averaged):
        raise ValueError(
            f"{path} holds several weights that fit: give the key of one, --teacher_weights_key or "
            f"--student_weights_key, {format_names(prefixes)}"
        )
    others = tuple(one for one in prefixes if one != pick) if averaged else ()
    return (pick, found[pick][0], inside(pick)), others


def _distinct(found: Mapping[str, tuple[str, dict[str, Tensor]]]) -> list[str]:
    """Return the prefixes without those whose weights equal those of an earlier one."""
    kept: list[str] = []
    for prefix, (_, weights) in found.items():
        if not any(_same(weights, found[other][1]) for other in kept):
            kept.append(prefix)
    return kept


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value is other[name] or (value.shape == other[name].shape and torch.equal(value, other[name]))
        for name, value in one.items()
    )


def common_beginnings(names: Iterable[str]) -> list[str]:
    """Return "" and the common prefixes of all names, part by part, for a network nested in others."""
    parts = [name.split(".")[:-1] for name in names]
    found = [""]
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1 or len(found) > 6:
            break
        found.append(f"{found[-1]}{level[0]}.")
    return found


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield all splits of a name into a prefix, of at most a dozen parts, and a rest."""
    yield "", name
    parts = name.split(".", 12)
    for count in range(1, len(parts)):
        yield ".".join(parts[:count]), ".".join(parts[count:])


def without_wrapper_parts(own: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove name parts added by wrappers, unless the network's own names have them."""
    used = {part for name in own for part in name.split(".")}
    added = [part for part in _WRAPPERS if part not in used]
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parts = name.split(".", 40)
        short = ".".join(part for part in parts if part not in added) or name
        found[name if short in found else short] = value
    return found


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Return the shape of an entry; None for an uninitialised one."""
    if isinstance(value, UNINITIALIZED) or not isinstance(value, Tensor):
        return None
    return tuple(value.shape)
