"""Students as programs: what is in the file computes what the student does, or there is no file."""

import copy
import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from rounding import assert_rounded, units_of
from torch import nn

from diffkd import save_student
from diffkd.commands.export import export
from diffkd.export.program_file import detection_difference
from diffkd.export.student_file import read_card
from diffkd.inference.students import load_student
from diffkd.models import load_backbone, load_detector, load_model, load_segmenter
from diffkd.models.segmenters.any_size import AnySize

OWN = str(Path(__file__).parents[1] / "program_models.py")
CARD = {"num_classes": 3, "in_channels": 3, "image_size": [12, 10], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def saved(model, folder, name, task="classification", **facts):
    save_student(model, folder / "s.safetensors", CARD | {"model": name, "task": task} | facts)
    return str(folder / "s.safetensors")


def run(file, images):
    return onnxruntime.InferenceSession(str(file)).run(None, {"images": images.numpy()})


def own(kind, folder, task="classification", **facts):
    load = {"classification": load_model, "segmentation": load_segmenter, "detection": load_detector}[task]
    model = load(f"{OWN}:{kind}", num_classes=3).eval()
    return model, saved(model, folder, f"{OWN}:{kind}", task, **facts)


class OfPixels(nn.Module):
    """Normalises first, as a program does that normalises itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        mean, std = (torch.tensor(CARD[name], dtype=pixels.dtype)[:, None, None] for name in ("mean", "std"))
        return self.model((pixels - mean) / std)


def assert_rounds(model, images, found):
    """Assert that a program returned what the model does, but for rounding: without gradients, two draws say enough."""
    wide = copy.deepcopy(model).double()
    found = {"logits": torch.as_tensor(found)}
    assert_rounded(found, lambda: {"logits": wide(images.double())}, units_of(torch.float32), 2)


@torch.no_grad()
def test_a_classifier_as_onnx(tmp_path, capsys):
    model = load_model("cifar/compact_resnet8", num_classes=3).eval()
    source = saved(model, tmp_path, "cifar/compact_resnet8")
    out = export(source, tmp_path / "c.onnx", normalize=True, opset=18)
    assert "batch may change; largest difference" in capsys.readouterr().out
    for batch in (1, 5):
        pixels = torch.rand(batch, 3, 12, 10)
        assert_rounds(OfPixels(model), pixels, run(out, pixels)[0])
    content = onnx.load(out)
    assert content.opset_import[0].version == 18
    assert [value.name for value in content.graph.output] == ["logits"]
    assert content.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    (entry,) = content.metadata_props
    assert entry.key == "diffkd"
    assert json.loads(entry.value) == read_card(out)
    assert read_card(out)["normalizes"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.onnx", "c.onnx.json", "s.json", "s.safetensors"]


@torch.no_grad()
def test_a_classifier_of_a_library_as_pt2(tmp_path):
    model = load_model("timm/test_vit", num_classes=3).eval()
    out = export(saved(model, tmp_path, "timm/test_vit", image_size=[160, 160]), tmp_path / "c.pt2")
    images = torch.rand(3, 3, 160, 160)
    assert_rounds(model, images, torch.export.load(out).module()(images))


@torch.no_grad()
def test_a_segmenter_takes_images_of_any_size(tmp_path, capsys):
    model, source = own("coarse", tmp_path, "segmentation")
    out = export(source, tmp_path / "s.onnx", model=f"{OWN}:coarse", image_size=[35, 33])
    assert "batch, height, width may change" in capsys.readouterr().out
    for batch, height, width in ((1, 35, 33), (2, 64, 32), (3, 17, 70)):
        images = torch.rand(batch, 3, height, width)
        (logits,) = run(out, images)
        assert logits.shape == (batch, 3, height, width)
        assert_rounds(AnySize(model), images, logits)
    names = [size.dim_param for size in onnx.load(out).graph.input[0].type.tensor_type.shape.dim]
    assert (names[0], *names[2:]) == ("batch", "height", "width")


@torch.no_grad()
def test_a_graph_that_would_differ_at_other_sizes_is_of_one_size(tmp_path, capsys):
    model, source = own("pooled", tmp_path, "segmentation")
    out = export(source, tmp_path / "s.onnx", model=f"{OWN}:pooled", image_size=[64, 96], normalize=True)
    text = capsys.readouterr().out
    assert "batch may change; not height, width: differs from the student by" in text
    for batch in (1, 3):
        images = torch.rand(batch, 3, 64, 96)
        assert_rounds(OfPixels(AnySize(model)), images, run(out, images)[0])
    height, width = onnx.load(out).graph.input[0].type.tensor_type.shape.dim[2:]
    assert (height.dim_value, width.dim_value) == (64, 96)
    assert load_student(out).module(torch.rand(1, 3, 40, 50)).shape == (1, 3, 40, 50)  # resized there and back


@torch.no_grad()
def test_a_program_that_cannot_be_written_for_other_sizes_is_of_one_size(tmp_path, capsys):
    model, source = own("halved", tmp_path, "segmentation")
    out = export(source, tmp_path / "s.pt2", model=f"{OWN}:halved", image_size=[64, 96])
    assert "batch may change; not height, width: op <built-in function ceil>" in capsys.readouterr().out
    images = torch.rand(3, 3, 64, 96)
    assert_rounds(AnySize(model), images, torch.export.load(out).module()(images))


@torch.no_grad()
def test_ties_are_resolved_as_onnx_defines_it(tmp_path):
    model, source = own("tied", tmp_path)
    out = export(source, tmp_path / "t.onnx", model=f"{OWN}:tied")
    images = torch.rand(2, 3, 12, 10)
    first = model.layer(images).flatten(2)[..., :5].mean(2)
    torch.testing.assert_close(torch.from_numpy(run(out, images)[0]), first)


@torch.no_grad()
def test_a_check_within_a_model_becomes_part_of_the_program(tmp_path):
    model, source = own("checked", tmp_path)
    out = export(source, tmp_path / "c.onnx", model=f"{OWN}:checked")
    images = torch.rand(2, 3, 12, 10)
    torch.testing.assert_close(torch.from_numpy(run(out, images)[0]), model(images))


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_a_backbone_returns_its_embedding(tmp_path, suffix):
    model = load_backbone("cifar/compact_resnet8").eval()
    facts = {"task": "representation", "classes": []}
    out = export(saved(model, tmp_path, "cifar/compact_resnet8", **facts), tmp_path / f"b{suffix}")
    images = torch.rand(3, 3, 12, 10)
    assert_rounds(model, images, load_student(out).module(images))
    if suffix == ".onnx":
        assert [one.name for one in onnxruntime.InferenceSession(str(out)).get_outputs()] == ["embedding"]


@pytest.mark.skipif(torch.__version__ < "2.9", reason="PyTorch 2.8 cannot follow what a detector sorts out")
@torch.no_grad()
def test_a_detector_as_onnx(tmp_path, capsys):
    model, source = own("tiny_fcos", tmp_path, "detection")
    out = export(source, tmp_path / "d.onnx", model=f"{OWN}:tiny_fcos", image_size=[32, 48])
    assert "for images (1, 3, 32, 48) only" in capsys.readouterr().out
    assert run(out, torch.rand(1, 3, 32, 48))[0].shape == (0, 4)  # an untrained one is sure of nothing
    content = onnx.load(out)
    assert [value.name for value in content.graph.output] == ["boxes", "scores", "labels"]
    (threshold,) = (one for one in content.graph.initializer if one.name == "score_threshold")
    assert onnx.numpy_helper.to_array(threshold) == pytest.approx(model.score_thresh)
    model.score_thresh = 0.0
    threshold.CopyFrom(onnx.numpy_helper.from_array(torch.zeros(()).numpy(), "score_threshold"))
    onnx.save(content, tmp_path / "all.onnx")
    images = torch.rand(1, 3, 32, 48)
    expected = model([images[0]])[0]
    found = [torch.from_numpy(value) for value in run(tmp_path / "all.onnx", images)]
    assert len(found[1]) > 5
    assert detection_difference([expected[name] for name in ("boxes", "scores", "labels")], found, 100) < 1e-5


def test_a_batch_that_is_fixed_is_said_to_be(tmp_path, capsys):
    model, source = own("fixed_batch", tmp_path)
    out = export(source, tmp_path / "c.pt2", model=f"{OWN}:fixed_batch")
    text = capsys.readouterr().out
    assert "not batch: " in text
    images = torch.rand(1, 3, 12, 10)
    assert_rounds(model, images, torch.export.load(out).module()(images))


@pytest.mark.parametrize(
    ("kind", "message"), [("undecided", r"cannot be exported as \.pt2"), ("random", "differs from the student")]
)
def test_what_cannot_be_exported_leaves_no_file(tmp_path, kind, message):
    _, source = own(kind, tmp_path)
    (tmp_path / "c.pt2").write_text("old")
    with pytest.raises(ValueError, match=message) as caught:
        export(source, tmp_path / "c.pt2", model=f"{OWN}:{kind}")
    assert ".safetensors" in str(caught.value)
    assert (tmp_path / "c.pt2").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pt2", "s.json", "s.safetensors"]


def test_code_runs_only_if_it_is_named(tmp_path):
    _, source = own("coarse", tmp_path)
    with pytest.raises(ValueError, match=r"names code to run.*--model"):
        export(source, tmp_path / "c.pt2")
    save_student(load_model(f"{OWN}:coarse", num_classes=3), source, CARD | {"model": f"hf/{OWN}:coarse"})
    with pytest.raises(ValueError, match=r"names code to run.*--model"):
        export(source, tmp_path / "c.pt2")


def test_what_is_missing_or_wrong_is_named(tmp_path, monkeypatch):
    model = load_model("cifar/compact_resnet8", num_classes=3)
    source = saved(model, tmp_path, "cifar/compact_resnet8")
    with pytest.raises(ValueError, match=r"\.safetensors, \.onnx, \.pt2, \.xml; got"):
        export(source, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="at least 18"):
        export(source, tmp_path / "c.onnx", opset=11)
    with pytest.raises(ValueError, match="image_size"):
        export(source, tmp_path / "c.onnx", image_size=[1, 2, 3])
    with pytest.raises(ValueError, match=r"s\.safetensors does not fit"):
        export(source, tmp_path / "c.onnx", model="cifar/compact_resnet14")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"c\.onnx needs onnxscript.*diffkd\[onnx\]"):
        export(source, tmp_path / "c.onnx")
    (tmp_path / "s.json").unlink()
    with pytest.raises(ValueError, match=r"s\.safetensors has no card.*--model"):
        export(source, tmp_path / "c.onnx")
    with pytest.raises(ValueError, match=r"no card that says 'image_size'"):
        export(source, tmp_path / "c.onnx", model="cifar/compact_resnet8")


def test_detections_are_compared_whatever_their_order():
    boxes, scores, labels = (
        torch.tensor([[0.0, 0, 10, 10], [5, 5, 9, 9]]),
        torch.tensor([0.5, 0.5]),
        torch.tensor([1, 2]),
    )
    one, other = (boxes, scores, labels), (boxes.flip(0), scores, labels.flip(0))
    assert detection_difference(one, other, 100) == 0
    assert detection_difference(one, (boxes + 1, scores, labels), 100) == pytest.approx(0.1)
    assert detection_difference(one, (boxes, scores - 0.25, labels), 100) == pytest.approx(0.25)
    assert detection_difference(one, (boxes, scores, labels + 1), 100) == float("inf")
    assert detection_difference(one, (boxes[:1], scores[:1], labels[:1]), 100) == float("inf")
    assert detection_difference((boxes[:0], scores[:0], labels[:0]), (boxes[:0], scores[:0], labels[:0]), 100) == 0
    # Which of those with the lowest score are cut off at the limit is left open.
    assert detection_difference(one, (boxes + 1, scores, labels), 2) == 0
