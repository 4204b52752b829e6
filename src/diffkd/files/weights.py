"""Weights as files: read as data, never as code; loaded strictly; written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_WRAPPERS = ("state_dict", "model", "model_state_dict")


def read_weights(path: str | Path, *, as_saved: bool = False) -> dict[str, Tensor]:
    """Read a file of tensors: safetensors, or a PyTorch file without running any code in it.

    Args:
        path: `.safetensors`, or anything `torch.load(weights_only=True)` reads: a state dict, bare or under one of the
            keys "state_dict", "model", "model_state_dict". The prefixes "module." (DistributedDataParallel) and
            "_orig_mod." (`torch.compile`) are taken off if every name has them.
        as_saved: leave the names as they are.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, of another kind, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give the path of a .safetensors or .pt file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or save it again") from error
    except Exception as error:  # torch.load raises whatever the broken or hostile bytes lead it to
        raise ValueError(
            f"{path} cannot be read as plain weights: it is damaged, of another kind, or holds Python objects, which "
            "are never run; save its state dict with torch.save(model.state_dict(), ...) or as safetensors"
        ) from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors); save model.state_dict()")
    weights = {str(name): value for name, value in content.items()}
    return weights if as_saved else _without_wrappers(weights)


def _without_wrappers(weights: dict[str, Tensor], own: Collection[str] = ()) -> dict[str, Tensor]:
    """Take the wrappers' prefixes off, until a name is one of the model's own: those may begin with "module." too."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if weights and all(name.startswith(prefix) and name not in own for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file of tensors into `model`, strictly: every entry fits, or nothing is changed.

    Args:
        model: receives the weights in place.
        path: as for :func:`read_weights`. One prefix more, such as the "model." of a trainer, is taken off if what is
            left are the model's own names, all of them.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_weights`; ValueError also if entries are missing, unexpected or of
            another shape, or parameters are not finite. The message lists them.
    """
    own = model.state_dict()
    weights = _without_wrappers(read_weights(path, as_saved=True), own)
    prefix = next(iter(weights), "").partition(".")[0] + "."
    if weights.keys() == {prefix + name for name in own}:
        weights = {name: weights[prefix + name] for name in own}
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    missing = [f"missing {name}" for name in own if name not in weights]
    unexpected = [f"unexpected {name}" for name in weights if name not in own]
    problems = [*missing, *unexpected, *shapes]
    if problems:
        shown = [*missing[:3], *unexpected[:3], *shapes[:3]]  # of each kind, since another prefix is seen in pairs only
        more = f" and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(shown)}{more}; "
            "build the model that the file was saved from (same name, number of classes and input channels)"
        )
    if broken := [name for name, _ in model.named_parameters() if not weights[name].isfinite().all()]:
        raise ValueError(f"{path} holds NaN or infinity in {', '.join(broken[:3])}: fetch or save it again")
    model.load_state_dict(weights)


def save_student(student: nn.Module, path: str | Path, card: Mapping[str, Any] | None = None) -> Path:
    """Save exactly the student's own state as safetensors, and a JSON card beside it.

    Args:
        student: a plain model; a `torch.compile` or DistributedDataParallel wrapper is taken off.
        path: ends in `.safetensors`; the card is written beside it as `.json`.
        card: JSON-serialisable facts about the student (how to build it, what it was trained on, its metrics).

    Returns:
        The path of the weights.

    Raises:
        ValueError: if `path` does not end in `.safetensors`, or the student's state holds more than tensors.
        OSError: if the file cannot be written; an earlier file of that name is then still whole.
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
    """Raise ValueError, naming the first, if entries of a model's state are no dense tensors, as safetensors holds."""
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
    """Write a text file whole or not at all, as :func:`write_whole` does."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that whatever happens, `path` holds either its old content or all of the new.

    Args:
        path: the file; its folder is made.
        write: writes the content to the path it is given.

    Raises:
        OSError: if writing fails (disk full, no permission), naming the path; what was there before stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # afterwards, since safetensors makes the file anew, for its owner alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError, RuntimeError)):
            raise OSError(
                f"could not write {path} ({error}); free some space or choose another folder; earlier files are whole"
            ) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
