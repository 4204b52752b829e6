"""Students as files: found, judged by their card, and taken out of runs and checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from diffkd.official import split_checkpoint
from diffkd.tasks.checkpointing import read_checkpoint
from diffkd.tasks.run_folder import RunFolder
from diffkd.weights import read_weights, write_text, write_whole

Which = Literal["last", "best"]


def find_student(source: str | Path, which: Which = "last") -> Path:
    """Return the file of a student.

    Args:
        source: the file itself, or the folder of a run.
        which: of a run, the student of the last or of the best epoch.

    Raises:
        FileNotFoundError: if there is no such file, or the run is not that far yet.
    """
    path = Path(source)
    if path.is_dir():
        run = RunFolder(path)
        path = run.student if which == "last" else run.best
        if not path.is_file():
            hint = "resume it first" if run.checkpoint.is_file() else "it is no finished run"
            raise FileNotFoundError(f"{run.path} holds no {path.name}: {hint}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no run and no file {path}; give a run's folder or a student's .safetensors")
    return path


def read_card(weights: str | Path) -> dict[str, Any]:
    """Return the JSON card beside a file of weights, {} if there is none.

    Raises:
        ValueError: if the card is damaged.
    """
    path = Path(weights).with_suffix(".json")
    if not path.is_file() or path == Path(weights):
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); delete it, or save the model again") from error
    if not isinstance(card, dict):
        raise ValueError(f"{path} is no card of a model; delete it, or save the model again")
    return card


def export(source: str, out: str | Path | None = None, *, which: Which = "last") -> Path:
    """Save the plain student of a run or of a checkpoint as safetensors, with its card beside it.

    Args:
        source: folder of a run, a last.ckpt, a student's file, or a checkpoint of the DiffKD authors' code.
        out: file to write, ends in .safetensors; None: student.safetensors here.
        which: of a run, the student of the last or of the best epoch.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if `out` is no .safetensors, or the source is damaged.
        OSError: if the file cannot be written.
    """
    target = Path("student.safetensors" if out is None else out)
    if target.suffix != ".safetensors":
        raise ValueError(f"a student is exported as .safetensors, got --out {target}")
    if Path(source).is_dir() and not RunFolder(source).result.is_file() and RunFolder(source).checkpoint.is_file():
        source = str(RunFolder(source).checkpoint)  # of a run that is still going on, the last checkpoint
    if Path(source).suffix == ".ckpt":
        weights, card = _from_checkpoint(read_checkpoint(source))
    else:
        path = find_student(source, which)
        weights, card = split_checkpoint(read_weights(path))[0], read_card(path)
    tensors = {name: value.clone().contiguous() for name, value in weights.items()}
    text = json.dumps(card, indent=2, sort_keys=True) + "\n"
    write_whole(target, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_text(target.with_suffix(".json"), text)
    print(f"{target}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} values")  # noqa: T201
    return target


def _from_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the student's own entries, those of its average if there is one, and its card."""
    own = checkpoint["diffkd"]
    if own["average"] is not None:
        return dict(own["average"]["model"]), dict(own["card"])
    prefix = own["student"]
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return state, dict(own["card"])
