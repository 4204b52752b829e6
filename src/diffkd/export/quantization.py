"""Smaller ONNX graphs: half precision, and 8-bit integers by onnxruntime; OpenVINO's format."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from diffkd.files.weights import write_whole
from diffkd.models.extras import require

Quantization = Literal["fp16", "int8", "int8-dynamic"]

_WHAT = "quantising a graph"
_CARD = "diffkd"


def quantize(source: Path, target: Path, kind: Quantization, images: Iterable[Tensor] | None = None) -> None:
    """Write a smaller version of a graph; its input and outputs stay in float32.

    Args:
        source: the .onnx file.
        target: file to write.
        kind: "fp16" stores and computes in half precision. "int8" has weights and activations of 8 bits, whose ranges
            are measured on images. "int8-dynamic" finds the ranges of activations as they come.
        images: for "int8", batches (B, C, H, W) that the graph takes.

    Raises:
        ValueError: if there are no images for "int8", or onnxruntime cannot convert the graph.
        ModuleNotFoundError: if the extra for ONNX is not installed.
        OSError: if the file cannot be written.
    """
    if kind == "int8" and images is None:
        raise ValueError("int8 needs images, on which the ranges of activations are measured: give them")
    onnx = require("onnx", "onnx", _WHAT)
    try:
        with _quiet():
            if kind == "fp16":
                converter = require("onnxruntime.transformers.float16", "onnx", _WHAT)
                model = converter.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
                write_whole(target, lambda file: onnx.save(model, str(file)))
            elif kind == "int8-dynamic":
                quantize_dynamic(source, target)
            else:
                _quantize_static(source, target, images or ())
    except (OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # its own and onnx's exceptions have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{source.name} cannot be converted to {kind} ({reason}): export it without quantize"
        ) from error
    _keep_card(source, target)


def quantize_dynamic(source: Path, target: Path) -> None:
    """Write a graph with weights of 8 bits, whose activations are quantised as they come; no images are needed.

    Args:
        source: the .onnx file.
        target: file to write.

    Raises:
        ModuleNotFoundError: if the extra for ONNX is not installed.
    """
    library = require("onnxruntime.quantization", "onnx", _WHAT)
    with _quiet():
        library.quantize_dynamic(source, target, weight_type=library.QuantType.QInt8)


def _quantize_static(source: Path, target: Path, images: Iterable[Tensor]) -> None:
    library = require("onnxruntime.quantization", "onnx", _WHAT)
    shape = require("onnxruntime.quantization.shape_inference", "onnx", _WHAT)
    batches = iter(images)

    def get_next(reader: object) -> dict[str, Any] | None:
        batch = next(batches, None)
        return None if batch is None else {"images": batch.numpy()}

    reader = type("Reader", (library.CalibrationDataReader,), {"get_next": get_next})
    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Folds BatchNorms into convolutions, which are then quantised as one.
        shape.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        library.quantize_static(
            prepared,
            target,
            reader(),
            quant_format=library.QuantFormat.QDQ,
            per_channel=True,
            activation_type=library.QuantType.QUInt8,
            weight_type=library.QuantType.QInt8,
        )


def _keep_card(source: Path, target: Path) -> None:
    """Copy the card in the metadata, which the conversions may drop."""
    onnx = require("onnx", "onnx", _WHAT)
    cards = [
        entry.value for entry in onnx.load(str(source), load_external_data=False).metadata_props if entry.key == _CARD
    ]
    model = onnx.load(str(target))
    if cards and all(entry.key != _CARD for entry in model.metadata_props):
        onnx.helper.set_model_props(model, {_CARD: cards[0]})
        onnx.save(model, str(target))


def write_openvino(source: Path, target: Path, example: Tensor | None = None) -> None:
    """Write an ONNX graph in OpenVINO's format: `target`, which ends in .xml, and its weights, in .bin.

    Args:
        source: the .onnx file.
        target: the .xml file to write.
        example: images (B, C, H, W), on which the logits of both must agree in float32; None: they are not compared.

    Raises:
        ModuleNotFoundError: if the extra for OpenVINO is not installed.
        ValueError: if OpenVINO cannot convert the graph, or gives other logits; nothing is written then.
    """
    openvino = require("openvino", "openvino", f"exporting {target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        model = openvino.convert_model(str(source))
        if example is not None:
            # On some processors it computes in bfloat16 unless it is told otherwise.
            compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            found = torch.from_numpy(compiled(example.numpy())[0])
            runtime = require("onnxruntime", "onnx", f"checking {target.name}")
            session = runtime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
            expected = torch.from_numpy(session.run(None, {"images": example.numpy()})[0])
            if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * max(1.0, float(expected.abs().max()))):
                difference = float((found - expected).abs().max())
                raise ValueError(
                    f"OpenVINO's logits differ from the student's by {difference:.1e}; nothing was written: "
                    "export it as .onnx"
                )
        openvino.save_model(model, str(target), compress_to_fp16=False)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"OpenVINO cannot convert this student ({reason}): export it as .onnx") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence onnxruntime's advice, written to the root logger, within this context."""
    root = logging.getLogger()
    before, root.disabled = root.disabled, True
    try:
        yield
    finally:
        root.disabled = before
