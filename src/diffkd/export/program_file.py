"""Export of students as ONNX or PyTorch programs, compared with the student before the file is kept."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffkd.export.plain_student import PlainStudent
from diffkd.files.weights import write_whole
from diffkd.models.extras import require

_AXES = {"batch": 0, "height": 2, "width": 3}
_SMALL = 0.1  # smaller logits are compared absolutely: rounding errors of earlier layers are a large share of them
_CARD = "diffkd"  # metadata key of the card in the file
_KNOWN = (
    (".*create_unbacked_symint.*", FutureWarning),  # from torchvision
    (".*LeafSpec.*", FutureWarning),
    ("The given buffer is not writable.*", UserWarning),  # from PyTorch 2.11's reader
)


def write_program(student: PlainStudent, target: Path, card: str, *, opset: int | None, tolerance: float) -> str:
    """Write a student as .onnx or .pt2, and keep the file only if its outputs agree with the student's.

    The sets of dynamic axes are tried in the student's order; the first that can be exported is used.

    Args:
        student: the student.
        target: file that ends in .onnx or .pt2.
        card: JSON text, stored in the file.
        opset: ONNX opset; None: PyTorch's default.
        tolerance: largest allowed difference, relative to the largest logit or to 0.1 if that is larger; for a
            detector, in scores and as a share of the image size.

    Returns:
        One line with the dynamic axes and the largest difference.

    Raises:
        ValueError: if the student cannot be exported, or the outputs of the file differ.
        ModuleNotFoundError: if the extra for ONNX is not installed.
        OSError: if the file cannot be written.
    """
    onnx = target.suffix == ".onnx"
    if onnx:
        for library in ("onnx", "onnxscript", "onnxruntime"):
            require(library, "onnx", f"exporting {target.name}")
    attempts: list[str] = []
    differs: _DiffersError | None = None
    for axes in student.dynamic:
        outcome: list[float] = []

        def write(file: Path, axes: tuple[str, ...] = axes, outcome: list[float] = outcome) -> None:
            program = _exported(student, axes)
            run = _write_onnx(program, file, student, axes, card, opset) if onnx else _write_pt2(program, file, card)
            outcome.append(_largest_difference(student, run, axes, tolerance))

        try:
            with quiet_exporters(), torch.no_grad():
                write_whole(target, write)
        except _CannotExportError as error:
            attempts.append(str(error))
            continue
        except _DiffersError as error:  # such as pooling to a number of cells that was computed for the example's size
            attempts.append(error.reason)
            differs = error
            continue
        changing = f"{', '.join(axes)} may change" if axes else f"for images {(1, *student.example.shape[1:])} only"
        lost = f"; not {', '.join(sorted({*student.dynamic[0]} - {*axes}))}: {attempts[0]}" if attempts else ""
        return f"{changing}{lost}; largest difference to the student {outcome[0]:.1e}"
    if differs is not None and attempts[-1] == differs.reason:
        raise differs
    raise ValueError(f"this student cannot be exported as {target.suffix} ({attempts[-1]}); export it as .safetensors")


class _CannotExportError(Exception):
    """A student that cannot be traced or converted with these axes."""


class _DiffersError(ValueError):
    """A file whose outputs differ from the student's."""

    def __init__(self, reason: str, tolerance: float) -> None:
        super().__init__(
            f"the exported file {reason}, more than the tolerance {tolerance:.1e}; it was not kept. Give another "
            "--tolerance, or export as .safetensors"
        )
        self.reason = reason


def _exported(student: PlainStudent, axes: Sequence[str]) -> Any:
    dynamic = {_AXES[axis]: torch.export.Dim.DYNAMIC for axis in axes}
    example = student.example if student.example.shape[0] == 1 or "batch" in axes else student.example[:1]
    # Tracing can raise any exception of the model's code.
    with _export_errors():
        return torch.export.export(student.module, (example,), dynamic_shapes=(dynamic or None,), strict=False)


def _write_onnx(
    program: Any, file: Path, student: PlainStudent, axes: Sequence[str], card: str, opset: int | None
) -> Callable[[Tensor], list[Tensor]]:
    runtime = require("onnxruntime", "onnx", "checking the exported file")
    for node in program.graph.nodes:
        if node.target is torch.ops.aten._is_all_true.default:  # in a check of D-FINE's; the converter knows its equal
            node.target = torch.ops.aten.all.default
    with _export_errors():
        converted: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=["images"],
            output_names=list(student.outputs),
        )
    model = converted.model
    if opset is not None and model.opset_imports[""] != opset:
        raise ValueError(f"opset {opset} cannot be had, only {model.opset_imports['']}; leave --opset out, or give it")
    _name_axes(model, axes)
    model.metadata_props[_CARD] = card
    converted.save(file, external_data=False)

    checked = file
    if "score_threshold" in model.graph.initializers:
        # A trained detector finds nothing in noise, so it is compared at score threshold 0.
        checked = file.with_name(file.name + ".check")
    try:
        if checked != file:
            _write_with_threshold_zero(file, checked)
        with _export_errors():
            session = runtime.InferenceSession(str(checked), providers=["CPUExecutionProvider"])
    finally:
        if checked != file:
            checked.unlink(missing_ok=True)

    def run(images: Tensor) -> list[Tensor]:
        with _export_errors():
            return [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]

    return run


def _write_with_threshold_zero(file: Path, other: Path) -> None:
    onnx = require("onnx", "onnx", "checking the exported file")
    model = onnx.load(str(file))
    for constant in model.graph.initializer:
        if constant.name == "score_threshold":
            constant.CopyFrom(onnx.numpy_helper.from_array(torch.zeros(()).numpy(), "score_threshold"))
    onnx.save(model, str(other))


def _name_axes(model: Any, axes: Sequence[str]) -> None:
    """Name the dynamic axes of inputs and outputs, instead of "s77"."""
    shape = model.graph.inputs[0].shape
    names = {str(shape[_AXES[axis]]): axis for axis in axes}
    for node in (None, *model.graph):
        for value in (*model.graph.inputs, *model.graph.outputs) if node is None else node.outputs:
            for position, size in enumerate(value.shape or ()):
                if str(size) in names:
                    value.shape[position] = names[str(size)]


def _write_pt2(program: Any, file: Path, card: str) -> Callable[[Tensor], list[Tensor]]:
    content = io.BytesIO()
    with _export_errors():  # sizes can be computed by functions that the format does not know
        torch.export.save(program, content, extra_files={f"{_CARD}.json": card})
        loaded = torch.export.load(io.BytesIO(content.getvalue()))
    file.write_bytes(content.getvalue())
    if "score_threshold" in loaded.state_dict:
        loaded.state_dict["score_threshold"].zero_()
    module = loaded.module()

    def run(images: Tensor) -> list[Tensor]:
        with _export_errors():
            output = module(images)
        return [output] if isinstance(output, Tensor) else list(output)

    return run


def _largest_difference(
    student: PlainStudent, run: Callable[[Tensor], list[Tensor]], axes: Sequence[str], tolerance: float
) -> float:
    """Return the largest difference over images of several batch and image sizes.

    Raises:
        ValueError: if it is above the tolerance.
    """
    _, channels, height, width = student.example.shape
    sizes = [(height, width)]
    if "height" in axes:
        sizes += [(max(height // 2, 1) + 1, width + 3), (height + 32, width)]
    draw = torch.Generator().manual_seed(1)
    largest = 0.0
    for batch in (1, 3) if "batch" in axes else (1,):
        for size in sizes:
            images = torch.rand(batch, channels, *size, generator=draw)
            with _threshold_zero(student.original), _TiesByIndex(), _export_errors():
                expected = student.original(images)
                found = run(images)
            expected = [expected] if isinstance(expected, Tensor) else list(expected)
            if student.limit and expected[1].ndim == 2:  # the detections of several images
                difference = max(
                    detection_difference(*pair, student.limit)
                    for pair in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True)
                )
            elif student.limit:
                difference = detection_difference(expected, found, student.limit)
            else:
                difference = _relative_difference(expected[0], found[0])
            if not difference <= tolerance:  # also if it is NaN
                raise _DiffersError(
                    f"differs from the student by {difference:.1e} for images {tuple(images.shape)}", tolerance
                )
            largest = max(largest, difference)
    return largest


def _relative_difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    scale = max(_SMALL, float(expected.abs().max()))
    return float((expected - found).abs().max()) / scale


def detection_difference(expected: Sequence[Tensor], found: Sequence[Tensor], limit: int) -> float:
    """Return the largest difference of nearest detections: boxes relative to the largest coordinate, or scores.

    The order of detections with equal scores is ignored, and which of them are cut off at the limit.

    Args:
        expected: boxes (n, 4), scores (n,), labels (n,).
        found: likewise, with m detections.
        limit: largest number of detections.

    Returns:
        0 if both are empty, infinity if a detection has no match.
    """
    if len(expected[1]) != len(found[1]):
        return float("inf")
    if len(expected[1]) == 0:
        return 0.0
    scale = max(1.0, float(expected[0].abs().max()))
    boxes = (expected[0][:, None] - found[0]).abs().amax(-1) / scale
    scores = (expected[1][:, None] - found[1]).abs()
    distance = torch.maximum(boxes, scores).masked_fill(expected[2][:, None] != found[2], float("inf"))
    sure = [torch.ones_like(one[1], dtype=torch.bool) for one in (expected, found)]
    if len(expected[1]) == limit:
        sure = [one[1] > one[1][-1] + 1e-5 for one in (expected, found)]
    nearest = torch.cat((distance.amin(1)[sure[0]], distance.amin(0)[sure[1]], scores.diagonal()))
    return float(nearest.max())


@contextmanager
def _threshold_zero(original: nn.Module) -> Iterator[None]:
    """Set a detector's score threshold to 0 within this context."""
    heads: Any = getattr(original, "detector", None)
    heads = getattr(heads, "roi_heads", heads)
    before = getattr(heads, "score_thresh", None)
    if before is not None:
        heads.score_thresh = 0.0
    try:
        yield
    finally:
        if before is not None:
            heads.score_thresh = before


class _TiesByIndex(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets `topk` take the first of equal values within this context, as ONNX defines it and PyTorch leaves open.

    An untrained RT-DETR gives all positions the same score; the queries that it starts from are then up to the ties.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.topk.default:
            return _topk_by_index(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _topk_by_index(
    values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    ordered, index = torch.sort(values, dim=dim, descending=largest, stable=True)
    return ordered.narrow(dim, 0, k), index.narrow(dim, 0, k)


@contextmanager
def _export_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        if "specialized it to be a constant" in str(error):
            lines = ["the code of the model is bound to what it is in the example"]
        raise _CannotExportError((lines or [type(error).__name__])[0][:200]) from error


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silence the exporters' log, and their warnings about their own calls and about constants, within this context."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            for message, category in _KNOWN:
                warnings.filterwarnings("ignore", message=message, category=category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
