"""Files of weights: read as data, never as code; written atomically."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffkd.files.pickles import CodeError, Skipped, looks_like_pickle, read_pickle

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE_FILES = ("model.safetensors", *_INDEXES, "pytorch_model.bin")
"""Weight file names in a transformers folder, the preferred first."""
# Parts of a checkpoint that contain no weights of a network.
_NO_WEIGHTS = re.compile(
    r"optim|sched|scaler|rng|random_state|hyper_param|hparams|callbacks|^loops$|^config$|^args$|^opt$"
)
_USUAL = re.compile(
    r"^(state_dict|model|model_state_dict|model_state|net|network|params|weights|module|teacher_model)$"
)
_AVERAGED = re.compile(r"(^|_|\.)(ema|averaged?|swa|shadow)\d*(_|\.|$)", re.IGNORECASE)
_DEPTH = 6
_PARTIAL = ".partial"  # suffix of files that are being written
_STARTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`",
    b"<!DOCTYPE": "is a web page, not weights: fetch the file itself",
    b"<html": "is a web page, not weights: fetch the file itself",
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"BZh": "is compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed by xz: unpack it first",
    b"7z\xbc\xaf": "is an archive of 7-zip: unpack it first",
    b"\x89HDF": "is HDF5, as Keras writes it: convert it to safetensors with the library that it comes from",
    b"GGUF": "is GGUF, as llama.cpp reads it: take the weights of PyTorch that it was made from",
    b"\x93NUMPY": "is an array of NumPy, not a state dict: save the weights by name as safetensors",
}


@dataclass(frozen=True)
class Contents:
    """The tensors of a file and its other contents.

    Attributes:
        tensors: by name, prefixed with the keys of the mappings that contain them: "state_dict.conv.weight".
        keys: keys of the mappings that directly contain tensors, "" for the file as a whole; without those that have
            more tensors in mappings inside them.
        skipped: "args (argparse.Namespace)" for each object that was not read.
    """

    tensors: dict[str, Tensor]
    keys: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def under(self, key: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with a key, with the key removed."""
        prefix = f"{key}." if key else ""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def read_weights(path: str | Path, *, as_saved: bool = False, key: str | None = None) -> dict[str, Tensor]:
    """Read a file of tensors: safetensors, or a PyTorch file without running any code in it.

    Args:
        path: safetensors, or what `torch.save` or pickle wrote: a state dict, alone or nested in other mappings, as
            trainers save them; other objects are skipped. Or the index of a sharded transformers model.
        as_saved: keep the names unchanged. Otherwise the prefixes "module." (DistributedDataParallel) and "_orig_mod."
            (`torch.compile`) are removed if every name has them.
        key: key of the mapping to read, such as "state_dict_ema", if there are several. None: the only one; of raw and
            averaged (EMA) weights, the averaged ones.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, has another format, would run code, or contains several state dicts; the
            message lists their keys.
    """
    contents = read_contents(path)
    if not contents.keys:
        raise ValueError(no_state_dict(path, contents))
    weights = contents.under(choose_key(path, contents.keys, key))
    return weights if as_saved else without_wrappers(weights)


def read_contents(path: str | Path) -> Contents:
    """Read all tensors of a file from any nested mappings, and list its other contents.

    Args:
        path: as for :func:`read_weights`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, has another format, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give the path of a .safetensors or .pt file")
    if path.name in _INDEXES:
        return _read_shards(path)
    content = _read_file(path)
    if not isinstance(content, Mapping):
        kind = f"a whole object of class {content.path}" if isinstance(content, Skipped) else "no mapping"
        raise ValueError(f"{path} holds no state dict (it is {kind}); save its state dict: model.state_dict()")
    tensors: dict[str, Tensor] = {}
    keys: list[str] = []
    skipped: list[str] = []
    seen: set[int] = set()

    def walk(mapping: Mapping[Any, Any], key: str, depth: int) -> int:
        """Collect the tensors of a mapping and return their number."""
        if id(mapping) in seen:
            return 0
        seen.add(id(mapping))
        own = numbers = nested = 0
        for name, value in mapping.items():
            whole = f"{key}.{name}" if key else f"{name}"
            if isinstance(value, Tensor) and isinstance(name, str):
                own += 1
                numbers += not value.ndim
                tensors.setdefault(whole, value)
            elif isinstance(value, Skipped) and depth < 2:
                skipped.append(f"{_short(whole)} ({value.path})")
            elif isinstance(value, Mapping) and depth < _DEPTH and not _NO_WEIGHTS.search(f"{name}"[:80].lower()):
                nested += walk(value, whole, depth + 1)
        # A few tensors beside a state dict, such as the best accuracy, do not make the mapping around it one.
        if own and (not nested or own - numbers > nested):
            keys.append(key)
        return own + nested

    walk(content, "", 0)
    return Contents(tensors, tuple(sorted(keys)), tuple(skipped))


def no_state_dict(path: str | Path, contents: Contents) -> str:
    """Return the message about a file without tensors."""
    count = len(contents.skipped)
    instead = f", only {contents.skipped[0]}{f' and {count - 1} like it' if count > 1 else ''}" if count else ""
    return f"{path} holds no state dict (a mapping of names to tensors){instead}; save model.state_dict()"


def choose_key(path: str | Path, keys: Collection[str], key: str | None = None) -> str:
    """Return the key of the mapping that contains the weights.

    Raises:
        ValueError: if there is no such key, or there are several and `key` is None.
    """
    if key is not None:
        if key not in keys:
            raise ValueError(f"{path} has no weights under the key {key!r}; there are {format_names(keys)}")
        return key
    if len(keys) == 1 or "" in keys:
        return "" if "" in keys else next(iter(keys))
    usual = [one for one in keys if _USUAL.match(one.rpartition(".")[2])]
    averaged = [one for one in keys if is_averaged(one)]
    found = averaged if averaged else usual
    if len(found) != 1 or len(usual) > 1:
        raise ValueError(f"{path} holds several state dicts: give one of their keys, {format_names(keys)}")
    return found[0]


def is_averaged(key: str) -> bool:
    """Whether a key names averaged (EMA) weights.

    >>> is_averaged("state_dict_ema"), is_averaged("schema")
    (True, False)
    """
    return _AVERAGED.search(key) is not None


def format_names(names: Collection[str], count: int = 8) -> str:
    """Return quoted names for a message, at most `count` of them."""
    shown = ", ".join(repr(_short(name)) for name in list(names)[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def _short(name: str) -> str:
    return "".join(one if one.isprintable() else "?" for one in name[:80])


def _read_file(path: Path) -> Any:
    """Return the content of a single file."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path} is empty: fetch or save it again")
    if found := next((what for mark, what in _STARTS.items() if start.startswith(mark)), None):
        raise ValueError(f"{path} {found}")
    if start[4:8] == b"TFL3":
        raise ValueError(f"{path} is a program of TensorFlow Lite, which no network of PyTorch can take")
    if path.suffix == ".onnx":
        raise ValueError(f"{path} is a program of ONNX, not weights: take the weights of PyTorch that it was made from")
    if start[257:262] == b"ustar":
        raise ValueError(f"{path} is a tar archive: unpack it first, and give the file of weights in it")
    # A safetensors header begins with its length, which can look like any other format.
    if start[8:9] == b"{" or (path.suffix == ".safetensors" and not looks_like_pickle(path)):
        try:
            return load_file(path)
        except Exception as error:  # safetensors' own errors, and decoding errors of the header
            raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or save it again") from error
    return _read_pickle(path)


def _read_pickle(path: Path) -> Any:
    try:
        return read_pickle(path)
    except CodeError as error:
        raise ValueError(
            f"{path} cannot be read as plain weights: it would run {error}, and files are never run; take it from a "
            "source that you trust, and save its state dict with torch.save(model.state_dict(), ...) or as safetensors"
        ) from error
    except Exception as error:  # damaged or malicious bytes can raise anything
        known = type(error) is ValueError and str(error).startswith(("it ", "its "))
        reason = str(error) if known else "it is damaged"
        raise ValueError(
            f"{path} cannot be read as plain weights: {reason}, or of another kind; files are never run: save its "
            "state dict with torch.save(model.state_dict(), ...) or as safetensors"
        ) from error


def _read_shards(index: Path) -> Contents:
    """Read the shards listed in a transformers index, which are in the same folder."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in entries.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights ({error}); fetch it again") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not os.path.isfile(index.parent / name):  # noqa: PTH113 - of any length
            raise ValueError(f"{index} lists {_short(name)}, which is not beside it: fetch all files of the model")
        tensors |= read_contents(index.parent / name).tensors
    return Contents(tensors, ("",))


def shard_hint(path: str | Path) -> str:
    """Return advice if a file is one shard of a model, "" if it is not."""
    path = Path(path)
    if not _SHARD.search(path.name):
        return ""
    return f"; it is one of several files of a model: give their folder, {path.parent}"


def without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the wrappers' prefixes "module." and "_orig_mod.", if all names have them."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def save_student(student: nn.Module, path: str | Path, card: Mapping[str, Any] | None = None) -> Path:
    """Save exactly the student's own state dict as safetensors, and a JSON card beside it.

    Args:
        student: a plain model; a `torch.compile` or DistributedDataParallel wrapper is removed.
        path: ends in `.safetensors`; the card is written beside it as `.json`.
        card: JSON-serialisable facts about the student (how to build it, what it was trained on, its metrics).

    Returns:
        The path of the weights.

    Raises:
        ValueError: if `path` does not end in `.safetensors`, or the student's state dict contains more than tensors.
        OSError: if the file cannot be written; an existing file of that name is then unchanged.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a student is saved as .safetensors, got {path.name!r}; load_weights reads it back")
    check_savable(student)
    # Cloned, since safetensors refuses entries that share memory (tied weights) and strides other than contiguous ones.
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in unwrap(student).state_dict().items()
    }
    facts = {"parameters": sum(p.numel() for p in unwrap(student).parameters()), **(card or {})}
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    write_whole(path, lambda file: save_file(state, file, metadata={"format": "pt"}))
    write_text(path.with_suffix(".json"), text)
    return path


def check_savable(student: nn.Module) -> None:
    """Raise ValueError for the first state dict entry that is not a dense tensor, which safetensors cannot store."""
    for name, value in unwrap(student).state_dict().items():
        if not isinstance(value, Tensor):
            what, mend = f"a {type(value).__name__}", "let get_extra_state return a tensor, or keep it out of the state"
        elif value.layout is not torch.strided:
            what, mend = "a sparse tensor", "make it dense, or register it with persistent=False"
        else:
            continue
        raise ValueError(
            f"entry {name!r} of the state of {type(unwrap(student)).__name__} is {what}, and a student is saved as "
            f"safetensors, which hold dense tensors alone: {mend}"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`'s and (Distributed)DataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as :func:`write_whole` does."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: `path` always has either its old or its complete new content.

    Args:
        path: the file; its folder is created.
        write: writes the content to the path it is given.

    Raises:
        OSError: if writing fails (disk full, no permission), naming the path; the old content is kept.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PARTIAL)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # afterwards, since safetensors recreates the file with owner-only access
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError, RuntimeError)):
            mend = "choose another folder" if _of_the_place(error) else "free some space or choose another folder"
            raise OSError(
                f"could not write {path} ({_reason(path, error)}); {mend}; earlier files are whole"
            ) from error
        raise


def check_target(path: Path, example: str) -> None:
    """Check that a file can be at a place, before what it is for is computed.

    Args:
        path: the file to write later.
        example: a name for it, for the message.

    Raises:
        ValueError: if there is a folder, or a file where its folder should be.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file as --out, such as {example}")
    above = next((parent for parent in path.absolute().parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{path} cannot be written, since {above} is a file and no folder; give another --out")


def _of_the_place(error: Exception) -> bool:
    """Whether a file cannot be written because of where it is to be, however much space is free there."""
    places = (errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
    return isinstance(error, OSError) and error.errno in places


def _reason(path: Path, error: Exception) -> str:
    """Return why a file could not be written: writers other than Python's do not say that a disk is full."""
    if not isinstance(error, OSError):
        with suppress(OSError):
            free = shutil.disk_usage(path.parent).free / 2**20
            return f"{error if free >= 1 else 'No space left on device'}; {free:,.1f} MiB are free there"
    return str(error)


def is_partial(path: Path) -> bool:
    """Return whether a file is one that :func:`write_whole` was writing when its process was killed."""
    return path.name.startswith(".") and path.suffix == _PARTIAL


def remove_partial(folder: Path) -> None:
    """Remove the files that :func:`write_whole` was writing in a folder and below it when a process was killed.

    Only for a folder in which no other process writes.
    """
    for path in folder.rglob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
