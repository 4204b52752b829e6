"""`diffkd export`: save the plain student of a run or a checkpoint, as weights or as a program."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffkd.commands.evaluate import data_of, evaluate
from diffkd.data.image_data import allow_missing_training_images
from diffkd.export.plain_student import facts_of_card, rebuild
from diffkd.export.program_file import write_program
from diffkd.export.quantization import Quantization, write_openvino
from diffkd.export.quantization import quantize as write_quantized
from diffkd.export.student_file import PROGRAMS, Which, card_file, check_card, find_student, read_card
from diffkd.files.run_folder import RunFolder
from diffkd.files.weights import check_target, read_weights, write_text, write_whole
from diffkd.inference.students import load_program
from diffkd.official import split_checkpoint
from diffkd.tasks.data_facts import facts_of
from diffkd.teacher.view import TeacherInput
from diffkd.training.checkpointing import read_checkpoint

_SUFFIXES = (".safetensors", *PROGRAMS, ".xml")


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
    quantize: Quantization | None = None,
    calibration_images: int = 128,
    measure: bool | None = None,
    trust: list[str] | None = None,
) -> Path:
    """Save the plain student of a run or of a checkpoint, with its card beside it.

    As .safetensors, its weights under its own names; as .onnx or .pt2 (`torch.export`), a program, which is compared
    with the student before the file is kept. The programs take `images` and return

    - for classifiers and segmenters `logits`, (B, K) or (B, K, H, W), and for backbones `embedding`, (B, D), for images
      (B, C, H, W) normalised as in training. The batch size is dynamic, and for segmenters the image size; the printed
      line names axes that a model does not allow to change;
    - for torchvision's RetinaNet, FCOS and Faster R-CNN `boxes`, `scores` and `labels` of one image (1, 3, H, W) in [0,
      1] of a fixed size; for detectors of transformers of a batch of such images, as many as the model has queries.
      Detectors of other libraries can be saved only as .safetensors.

    As .xml, the graph is converted to OpenVINO's format, with its weights in a .bin beside it.

    Args:
        source: folder of a run, a last.ckpt, a student's file, or a checkpoint of the DiffKD authors' code.
        out: file to write, ends in .safetensors, .onnx, .pt2 or .xml; None: student.safetensors here.
        which: for a run, the student of the last or of the best epoch; for an unfinished run, that of the last
            checkpoint or of the best epoch so far.
        model: for .onnx and .pt2, name of the model; needed if the card names none, or names your own code.
        image_size: for these, [H, W] in pixels, or one side of a square; None: as in training.
        normalize: for these, include the normalisation, so that the input is images in [0, 1]. Detectors always do.
        opset: ONNX opset, from 18 on; None: PyTorch's default.
        tolerance: for these, largest difference to the student, relative to its largest logit; for detectors, in scores
            and as a share of the image size.
        quantize: for .onnx: fp16, int8 (with ranges of activations measured on evaluation images) or int8-dynamic.
        calibration_images: number of evaluation images for int8.
        measure: measure the quantised student on the evaluation images; None: if the data are there.
        trust: files and modules of your own whose code the card may name; may be repeated.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if `out` has another suffix, the source is damaged, the card lacks a required value, or the student
            cannot be exported as a program.
        ModuleNotFoundError: if an extra of this package must be installed first.
        OSError: if the file cannot be written.
    """
    target = Path("student.safetensors" if out is None else out)
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"a student is exported as {', '.join(_SUFFIXES)}; got --out {target}")
    check_target(target, "student.onnx")
    if quantize is not None and target.suffix != ".onnx":
        raise ValueError(f"quantize {quantize} is for .onnx, got --out {target}: leave it out, or give an .onnx")
    if calibration_images < 1:
        raise ValueError(f"calibration_images must be at least 1, got {calibration_images}")
    if opset is not None and (opset < 18 or target.suffix != ".onnx"):
        raise ValueError(f"opset {opset} is for .onnx, and must be at least 18; leave --opset out")
    run = RunFolder(source)
    if which == "last" and not run.result.is_file() and run.checkpoint.is_file():
        source = str(run.checkpoint)  # for an unfinished run, the last checkpoint
    if Path(source).suffix == ".ckpt":
        weights, card = _from_checkpoint(read_checkpoint(source))
        card = check_card(card, Path(source))
    else:
        path = find_student(source, which)
        card = read_card(path)
        # Only other files can contain more than a student, or names with a wrapper's prefix.
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
            except ValueError as error:  # whose message names the intermediate file
                raise ValueError(str(error).replace(str(plain), source)) from error
        card = {
            **card,
            "model": model or card["model"],
            "image_size": list(student.example.shape[2:]),
            "normalizes": normalize or card.get("task") == "detection",
        }
        if quantize is not None:
            card["quantized"] = quantize
        with TemporaryDirectory() as folder:
            graph = target
            if quantize is not None or target.suffix == ".xml":
                graph = Path(folder) / "student.onnx"
            note += "; " + write_program(student, graph, json.dumps(card), opset=opset, tolerance=tolerance)
            if target.suffix == ".xml":
                detects = card.get("task") == "detection"  # which finds nothing in noise
                write_openvino(graph, target, None if detects else student.example[:1])
            elif quantize is not None:
                images = _calibration_images(graph, card, calibration_images, trust) if quantize == "int8" else None
                write_quantized(graph, target, quantize, images)
                before, after = graph.stat().st_size, target.stat().st_size
                note += f"; {quantize}: {after / 2**20:.2f} MiB of {before / 2**20:.2f}"
    write_text(card_file(target), json.dumps(card, indent=2, sort_keys=True) + "\n")
    print(f"{target}: {note}")  # noqa: T201
    if measure or (measure is None and quantize is not None):
        _measure(target, required=bool(measure), trust=trust)
    return target


def _calibration_images(
    graph: Path, card: Mapping[str, Any], count: int, trust: Sequence[str] | None
) -> Iterator[Tensor]:
    """Return batches of one evaluation image, as the graph takes them.

    Raises:
        ValueError: if the card names no data, or they are not there.
    """
    student = load_program(graph)
    try:
        with allow_missing_training_images(card.get("classes") or ()):
            data = data_of(dict(card), trust or ())
        data.setup("validate")
        loader = data.val_dataloader()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"int8 measures the ranges of activations on evaluation images, and there are none ({error}): bring the "
            "data back, or take --quantize int8-dynamic, which needs none"
        ) from error
    facts = facts_of_card(card, graph)
    given = facts_of(data)
    convert = TeacherInput(given.mean, given.std, student.mean, student.std) if facts.task != "detection" else None
    images = (image[None].float().cpu() for batch in loader for image in batch[0])
    return (one if convert is None else convert(one) for one in islice(images, count))


def _measure(target: Path, *, required: bool, trust: Sequence[str] | None) -> None:
    """Print the measurements of an exported student; without its data nothing, unless they are required."""
    try:
        evaluate(str(target), trust=list(trust or ()), accelerator="cpu")
    except (OSError, ValueError) as error:
        if required:
            raise
        print(f"not measured ({error}): `diffkd test {target} --data ...` does it")  # noqa: T201


def _from_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the student's weights, the averaged (EMA) ones if present, and its card."""
    own = checkpoint["diffkd"]
    if own["average"] is not None:
        return dict(own["average"]["model"]), dict(own["card"])
    prefix = own["student"]
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return state, dict(own["card"])
