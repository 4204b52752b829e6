"""A saved student, ready to run: from its weights, a run folder, an ONNX graph or a program of `torch.export`."""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.export.plain_student import facts_of_card, named_model
from diffkd.export.program_file import quiet_exporters
from diffkd.export.student_file import PROGRAMS, Which, card_file, check_card, find_student, find_weights, read_card
from diffkd.models.extras import require
from diffkd.models.segmenters.any_size import AnySize
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.task_of_data import load_saved

_CARD = "diffkd"  # where programs hold their card


@dataclass(frozen=True)
class SavedStudent:
    """A student in evaluation mode, with what its input must look like.

    Attributes:
        path: its file.
        card: its card.
        facts: of the data it was trained on, without an example.
        module: for classifiers and segmenters maps images (B, C, H, W), normalised by `mean` and `std`, to logits; for
            detectors maps a list of images (3, H, W) in [0, 1], each of its own size, to a list of mappings with
            "boxes" (n, 4) in pixels, "scores" (n,) and "labels" (n,) from 1.
        mean: per channel, of the normalisation of its input, in units of [0, 1]; 0 for one that normalises itself.
        std: likewise; 1 for one that normalises itself.
        runtime: "pytorch", "torch.export" or "onnxruntime".
    """

    path: Path
    card: Mapping[str, Any]
    facts: DataFacts
    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    runtime: str


def load_student(
    source: str | Path,
    *,
    which: Which = "last",
    model: str | None = None,
    trust: Sequence[str] = (),
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> SavedStudent:
    """Load a saved student.

    A .onnx is data, and runs in onnxruntime. A .pt2 is a program of PyTorch: load only one that you trust.

    Args:
        source: folder of a run, file of weights with a card beside it, or an exported .onnx or .pt2.
        which: for a run, the student of the last or of the best epoch.
        model: name of the model, if the card names none, or names your own code.
        trust: files and modules whose code the card may name.
        device: where it runs.
        threads: of onnxruntime; None: its default.

    Raises:
        FileNotFoundError: if there is no such student.
        ValueError: if it has no card, it is damaged or of another kind, or its weights do not fit the model.
        ModuleNotFoundError: if onnxruntime is needed and not installed.
    """
    path = Path(source).expanduser()
    if path.suffix in PROGRAMS and not path.is_dir():
        return load_program(path, device=device, threads=threads)
    if path.suffix == ".ckpt" and path.is_file():
        raise ValueError(
            f"{path} holds a whole training: take the student out of it with `diffkd export {path} --out "
            "student.safetensors`, and give that"
        )
    try:
        path = find_student(path, which)
    except FileNotFoundError:
        if path.exists():
            raise
        try:
            path = find_weights(source)  # a teacher of the package
        except FileNotFoundError:
            if str(source).startswith("hub:"):
                raise ValueError(f"{str(source)!r} is no name of the Hub: write hub:USER/NAME") from None
            raise FileNotFoundError(
                f"there is no run and no file {source}: give a run's folder, or a student's .safetensors, .onnx or .pt2"
            ) from None
    card = read_card(path)
    name = model or named_model(card, path, trust)
    facts = facts_of_card(card, path)
    module = load_saved(name, facts, path, card).eval().to(device)
    return SavedStudent(path, card, facts, module, facts.mean, facts.std, "pytorch")


def load_program(path: Path, *, device: torch.device | str = "cpu", threads: int | None = None) -> SavedStudent:
    """Load an exported .onnx or .pt2, with the card beside it or else the one in it.

    Args:
        path: the file.
        device: where it runs.
        threads: of onnxruntime; None: its default.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or has no card.
        ModuleNotFoundError: if onnxruntime is needed and not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a run's folder, or a student's .safetensors or program")
    run, shape, inside = (
        load_onnx(path, torch.device(device), threads) if path.suffix == ".onnx" else _pt2(path, torch.device(device))
    )
    card = read_card(path) or _parsed(inside, path)
    facts = facts_of_card(card, path)
    sizes = [side if isinstance(side, int) else None for side in shape]
    if facts.task == "detection":
        module: nn.Module = DetectorProgram(run, sizes)
    else:
        dense = facts.task == "segmentation"
        module = LogitsProgram(run, sizes, dense=dense)
        module = AnySize(module, stride=1) if dense else module  # so that meters pad nothing
    if card.get("normalizes"):
        zeros, ones = (0.0,) * facts.in_channels, (1.0,) * facts.in_channels
        return SavedStudent(path, card, facts, module, zeros, ones, _RUNTIMES[path.suffix])
    return SavedStudent(path, card, facts, module, facts.mean, facts.std, _RUNTIMES[path.suffix])


_RUNTIMES = {".onnx": "onnxruntime", ".pt2": "torch.export"}
Run = Callable[[Tensor], Sequence[Tensor]]


def _parsed(text: str | None, path: Path) -> dict[str, Any]:
    try:
        card = json.loads(text or "")
    except ValueError as error:
        raise ValueError(
            f"{path} holds no card of a student, and there is no {card_file(path).name} beside it: export it again "
            "with `diffkd export`"
        ) from error
    return check_card(card, path)


def load_onnx(
    path: Path, device: torch.device | None = None, threads: int | None = None
) -> tuple[Run, Sequence[Any], str | None]:
    """Load a graph of one input into onnxruntime.

    Args:
        path: the .onnx file.
        device: where it runs, if this onnxruntime can; None: on the CPU.
        threads: number of threads; None: onnxruntime's default.

    Returns:
        The function from images (B, C, H, W) to its outputs; the shape of its input, with names for axes that may
        change; and the text of its card, None if it has none.

    Raises:
        ValueError: if the file is damaged, or has several inputs.
        ModuleNotFoundError: if onnxruntime is not installed.
    """
    runtime = require("onnxruntime", "onnx", f"running {path.name}")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted = ("CUDAExecutionProvider",) if device is not None and device.type == "cuda" else ()
    providers = [one for one in (*wanted, "CPUExecutionProvider") if one in runtime.get_available_providers()]
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise ValueError(f"{path} cannot be read as ONNX ({_first_line(error)}): export it again") from error
    given, *others = session.get_inputs()
    if others:
        raise ValueError(f"{path} takes {1 + len(others)} inputs, a student takes images alone: export it again")
    kind = np.float16 if "float16" in given.type else np.float32

    def run(images: Tensor) -> list[Tensor]:
        found = session.run(None, {given.name: images.cpu().numpy().astype(kind, copy=False)})
        return [torch.from_numpy(np.asarray(one)).to(images.device) for one in found]

    return run, given.shape, session.get_modelmeta().custom_metadata_map.get(_CARD)


def _pt2(path: Path, device: torch.device) -> tuple[Run, Sequence[Any], str | None]:
    extra = {f"{_CARD}.json": ""}
    try:
        with quiet_exporters():
            program = torch.export.load(path, extra_files=extra)
    except (RuntimeError, ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a program ({_first_line(error)}): export it again") from error
    shape = next(
        node.meta["val"].shape for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    )
    module = program.module().to(device)

    def run(images: Tensor) -> list[Tensor]:
        output = module(images)
        return [output] if isinstance(output, Tensor) else list(output)

    return run, shape, extra[f"{_CARD}.json"] or None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _Program(nn.Module):
    """A program in a module, which Lightning and meters can move and call.

    Args:
        run: maps images (B, C, H, W) to the outputs.
        shape: of the input; None for axes that may change.
    """

    def __init__(self, run: Run, shape: Sequence[int | None]) -> None:
        super().__init__()
        self.run = run
        self.batch, _, *sides = shape
        self.size = None if None in sides else (int(sides[0] or 0), int(sides[1] or 0))
        # A parameter, so that users of the module find its device and dtype.
        self.place = nn.Parameter(torch.zeros(0), requires_grad=False)


class LogitsProgram(_Program):
    """A classifier or segmenter that maps images (B, C, H, W) of any batch, and segmenters of any size, to logits.

    Args:
        run: maps images to logits in a list.
        shape: of the input; None for axes that may change. Images of another size are resized to a fixed one, and the
            class maps back.
        dense: whether the logits are class maps.
    """

    def __init__(self, run: Run, shape: Sequence[int | None], *, dense: bool) -> None:
        super().__init__(run, shape)
        self.dense = dense

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) or (B, K, H, W)."""
        size = tuple(images.shape[-2:])
        resizes = self.size is not None and size != self.size
        given = F.interpolate(images, self.size, mode="bilinear", antialias=True) if resizes else images
        parts = torch.split(given, self.batch or len(given))
        missing = 0 if self.batch is None else self.batch - len(parts[-1])
        if missing:  # a fixed batch is filled up
            parts = (*parts[:-1], torch.cat([parts[-1], parts[-1][-1:].expand(missing, *given.shape[1:])]))
        logits = torch.cat([self.run(part.contiguous())[0] for part in parts])[: len(images)].float()
        if resizes and self.dense:
            return F.interpolate(logits, size, mode="bilinear")
        return logits


class DetectorProgram(_Program):
    """A detector that maps a list of images (3, H, W) in [0, 1] to a list of detections.

    An image of another size is scaled to fit into the size of the program, and filled up at the right and at the bottom
    with grey; boxes are scaled back.
    """

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return "boxes" (n, 4), "scores" (n,) and "labels" (n,) of each image, best first."""
        fitted = [_fitted(image, self.size) for image in images]
        # A batch that may change is used as far as images are of one size.
        alike = self.batch is None and len({image.shape for image, _ in fitted}) == 1
        batches = [torch.stack([image for image, _ in fitted])] if alike else [image[None] for image, _ in fitted]
        found: list[Sequence[Tensor]] = []
        for batch in batches:
            outputs = self.run(batch.contiguous())
            found += list(zip(*outputs, strict=True)) if outputs[1].ndim == 2 else [outputs]
        result = []
        for image, (_, scale), (boxes, scores, labels) in zip(images, fitted, found, strict=True):
            height, width = image.shape[-2:]
            limit = boxes.new_tensor([width, height] * 2)
            corners = (boxes.float() / scale).clamp(min=0).minimum(limit.float())
            result.append({"boxes": corners, "scores": scores.float(), "labels": labels})
        return result


_GREY = 0.5


def _fitted(image: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, float]:
    """Return an image (3, H, W) scaled and padded to `size`, and the scale."""
    height, width = image.shape[-2:]
    if size is None or (height, width) == size:
        return image, 1.0
    scale = min(size[0] / height, size[1] / width)
    high, wide = (max(1, min(limit, round(side * scale))) for side, limit in zip((height, width), size, strict=True))
    scaled = F.interpolate(image[None], (high, wide), mode="bilinear", antialias=True)[0]
    return F.pad(scaled, (0, size[1] - wide, 0, size[0] - high), value=_GREY), scale
