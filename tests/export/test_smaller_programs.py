"""Detectors of transformers as programs, quantised graphs with their accuracy, and OpenVINO's format."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import DetrConfig, ResNetConfig, YolosConfig

from diffkd import save_student
from diffkd.commands import cli
from diffkd.commands.evaluate import evaluate
from diffkd.commands.export import export
from diffkd.data import FashionSubset
from diffkd.data.classification.fashion_mnist import read_fashion_subset
from diffkd.export.quantization import quantize
from diffkd.export.student_file import find_weights, read_card
from diffkd.inference.predictor import Predictor
from diffkd.inference.students import load_student
from diffkd.models import load_detector

TESTS = 300
QUIET = {"accelerator": "cpu", "progress": False}


def yolos():
    return YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        num_detection_tokens=6,
    )


def detr():
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16)
    counts = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    backbone = ResNetConfig(**resnet, out_features=["stage2"])
    layers = {"encoder_layers": 1, "decoder_layers": 1, "num_queries": 6}
    return DetrConfig(use_timm_backbone=False, backbone_config=backbone, **sizes, **counts, **layers)


@pytest.mark.parametrize(("kind", "suffix"), [(yolos, ".onnx"), (detr, ".pt2")])
@torch.no_grad()
def test_a_detector_of_transformers_is_a_program_of_batches(tmp_path, kind, suffix, capsys):
    kind().save_pretrained(tmp_path / "model")
    name = f"hf/{tmp_path / 'model'}"
    torch.manual_seed(0)
    model = load_detector(name, num_classes=3, min_size=(32,), max_size=64).eval()
    card = {"model": name, "task": "detection", "num_classes": 3, "in_channels": 3, "image_size": [40, 48]}
    card |= {"classes": ["a", "b", "c"], "data": {"init_args": {"min_size": 32, "max_size": 64}}}
    file = save_student(model, tmp_path / "student.safetensors", card)
    out = export(str(file), tmp_path / f"student{suffix}")
    assert "batch may change" in capsys.readouterr().out
    images = torch.rand(3, 3, 40, 48)
    student = load_student(out)
    for ours, theirs in zip(student.module(list(images)), model(list(images)), strict=True):
        assert torch.allclose(ours["scores"], theirs["scores"], atol=1e-4)
        assert torch.allclose(ours["boxes"].sum(), theirs["boxes"].sum(), rtol=1e-2)
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(out))
        assert [one.name for one in session.get_outputs()] == ["boxes", "scores", "labels"]
        assert session.get_inputs()[0].shape == ["batch", 3, 40, 48]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The packaged classifier, which has been trained, and its accuracy on the images that it is measured on here."""
    folder = tmp_path_factory.mktemp("teacher")
    packaged = find_weights("fashion_mnist/teacher.safetensors")
    _, test = read_fashion_subset()
    card = read_card(packaged)
    images, labels = test.images[:TESTS, 0].numpy(), test.labels[:TESTS].numpy()
    np.savez(folder / "images.npz", images=images, labels=labels, classes=card["classes"])
    given = {name: card["data"]["init_args"][name] for name in ("mean", "std")}
    values = given | {"train": str(folder / "images.npz"), "test": str(folder / "images.npz")}
    card["data"] = {"class_path": "diffkd.data.Arrays", "init_args": values}
    file = folder / "student.safetensors"
    file.write_bytes(packaged.read_bytes())
    file.with_suffix(".json").write_text(json.dumps(card))
    accuracy = evaluate(str(file), **QUIET)["top1"]
    assert accuracy > 0.85
    return str(file), accuracy


@pytest.mark.parametrize("kind", ["fp16", "int8", "int8-dynamic"])
def test_a_quantised_student_is_smaller_and_measured(tmp_path, teacher, kind, capsys):
    file, accuracy = teacher
    whole = export(file, tmp_path / "whole.onnx") if kind == "fp16" else None
    capsys.readouterr()
    out = export(file, tmp_path / "small.onnx", quantize=kind, calibration_images=32)
    said = capsys.readouterr().out
    assert f"{kind}: " in said
    assert "measured on" in said  # the accuracy after it
    assert read_card(out)["quantized"] == kind
    assert json.loads(load_student(out).card["model"] and json.dumps(read_card(out)))["model"]
    small = onnx.load(out)
    weights = sum(one.ByteSize() for one in small.graph.initializer)
    if whole is not None:
        assert weights < 0.7 * sum(one.ByteSize() for one in onnx.load(whole).graph.initializer)
    assert small.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert evaluate(str(out), **QUIET)["top1"] > accuracy - (0.01 if kind == "fp16" else 0.04)


def test_int8_needs_the_images_and_the_data_of_the_student(tmp_path, teacher):
    with pytest.raises(ValueError, match="int8 needs images"):
        quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", "int8")
    card = json.loads(Path(teacher[0]).with_suffix(".json").read_text()) | {
        "data": {"class_path": "diffkd.data.FashionMNIST", "init_args": {"root": str(tmp_path)}}
    }
    weights = tmp_path / "student.safetensors"
    weights.write_bytes(Path(teacher[0]).read_bytes())
    weights.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="take --quantize int8-dynamic"):
        export(str(weights), tmp_path / "small.onnx", quantize="int8")
    assert not (tmp_path / "small.onnx").exists()


def test_openvino_gives_the_same_answers(tmp_path, teacher):
    openvino = pytest.importorskip("openvino")
    out = export(teacher[0], tmp_path / "student.xml")
    assert out.with_suffix(".bin").is_file()
    assert read_card(out)["model"]
    images, _, _ = next(iter(FashionSubset(batch_size=4).val_dataloader()))
    # On some processors it computes in bfloat16 unless it is told otherwise.
    compiled = openvino.Core().compile_model(str(out), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(np.asarray(compiled(images.numpy())[0]))
    student = load_student(teacher[0])
    with torch.no_grad():
        assert torch.allclose(found, student.module(images), atol=1e-3)
    assert Predictor(student).classes == student.facts.classes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out={folder}/a.pt2", "--quantize=fp16"], "quantize fp16 is for .onnx"),
        (["--out={folder}/a.onnx", "--quantize=int4"], "int4"),
        ([f"--out={__file__}/a.onnx"], "test_smaller_programs.py is a file and no folder; give another --out"),
        (
            ["--out={folder}/a.onnx", "--quantize=int8", "--calibration_images=0"],
            "calibration_images must be at least 1",
        ),
    ],
)
def test_what_cannot_be_quantised_is_named(tmp_path, teacher, capsys, words, message):
    assert cli.main(["export", teacher[0], *(word.format(folder=tmp_path) for word in words)]) in (1, 2)
    assert message in capsys.readouterr().err
