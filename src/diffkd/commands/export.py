"""`diffkd export`: take the plain student out of a run or a checkpoint, as weights or as a program."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffkd.export.plain_student import rebuild
from diffkd.export.program_file import write_program
from diffkd.export.student_file import PROGRAMS, Which, card_file, find_student, read_card
from diffkd.files.run_folder import RunFolder
from diffkd.files.weights import read_weights, write_text, write_whole
from diffkd.official import split_checkpoint
from diffkd.training.checkpointing import read_checkpoint

_SUFFIXES = (".safetensors", *PROGRAMS)


def export(
    source: str,
    out: str | Path | None = None,
    *,
    which: Which = "last",
    model: str | None = None,
    image_size: list[int] | None = None,
    normalize: bool = False,
    opset: int | None = None,
    tolerance: float = 1e-4,
    trust: list[str] | None = None,
) -> Path:
    """Save the plain student of a run or of a checkpoint, with its card beside it.

    As .safetensors its own weights under its own names; as .onnx or .pt2 (`torch.export`) a program, which is compared
    with the student before the file stays. The programs take `images` and return

    - of classifiers and segmenters `logits`, (B, K) or (B, K, H, W), for images (B, C, H, W) normalised as in training.
      The batch may change, and of segmenters the size; where a model does not allow that, the line that is printed says
      so;
    - of torchvision's RetinaNet, FCOS and Faster R-CNN `boxes`, `scores` and `labels` of one image (1, 3, H, W) in
      [0, 1] of a fixed size. Detectors of transformers and of other makes go as .safetensors alone.

    Args:
        source: folder of a run, a last.ckpt, a student's file, or a checkpoint of the DiffKD authors' code.
        out: file to write, ends in .safetensors, .onnx or .pt2; None: student.safetensors here.
        which: of a run, the student of the last or of the best epoch; of one that still goes on, the last checkpoint's
            or that of the best epoch so far.
        model: for .onnx and .pt2, name of the model; needed where the card names none, or names your own code.
        image_size: for these, [H, W] in pixels, or one side of a square; None: as in training.
        normalize: for these, let the program take images in [0, 1] and normalise them itself. Detectors always do.
        opset: of ONNX, from 18 on; None: PyTorch's choice.
        tolerance: for these, largest difference to the student, as a share of its largest logit; of detectors, in
            scores and as a share of the image.
        trust: files and modules of your own whose code the card may name; may be repeated.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if `out` is of another kind, the source is damaged, the card does not say what is needed, or the
            student cannot be exported as a program.
        ModuleNotFoundError: if an extra of this package must be installed first.
        OSError: if the file cannot be written.
    """
    target = Path("student.safetensors" if out is None else out)
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"a student is exported as {', '.join(_SUFFIXES)}; got --out {target}")
    if opset is not None and (opset < 18 or target.suffix != ".onnx"):
        raise ValueError(f"opset {opset} is for .onnx, and must be at least 18; leave --opset out")
    run = RunFolder(source)
    if which == "last" and not run.result.is_file() and run.checkpoint.is_file():
        source = str(run.checkpoint)  # of a run that is still going on, the last checkpoint
    if Path(source).suffix == ".ckpt":
        weights, card = _from_checkpoint(read_checkpoint(source))
    else:
        path = find_student(source, which)
        card = read_card(path)
        # Only files from elsewhere can hold more than a student, or names that a wrapper has changed.
        weights = read_weights(path, as_saved=True) if card else split_checkpoint(read_weights(path))[0]
    tensors = {name: value.clone().contiguous() for name, value in weights.items()}
    note = f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} values"
    if target.suffix == ".safetensors":
        write_whole(target, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    else:
        with TemporaryDirectory() as folder:
            plain = Path(folder) / "student.safetensors"
            save_file(tensors, plain, metadata={"format": "pt"})
            try:
                student = rebuild(
                    plain, card, model=model, image_size=image_size, normalize=normalize, trust=trust or ()
                )
            except ValueError as error:  # which names the file in between
                raise ValueError(str(error).replace(str(plain), source)) from error
        card = {
            **card,
            "model": model or card["model"],
            "image_size": list(student.example.shape[2:]),
            "normalizes": normalize or card.get("task") == "detection",
        }
        note += "; " + write_program(student, target, json.dumps(card), opset=opset, tolerance=tolerance)
    write_text(card_file(target), json.dumps(card, indent=2, sort_keys=True) + "\n")
    print(f"{target}: {note}")  # noqa: T201
    return target


def _from_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the student's own entries, those of its average if there is one, and its card."""
    own = checkpoint["diffkd"]
    if own["average"] is not None:
        return dict(own["average"]["model"]), dict(own["card"])
    prefix = own["student"]
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return state, dict(own["card"])
