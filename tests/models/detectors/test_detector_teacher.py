"""The teacher's parts give exactly what the whole detector computes on the way, and nothing else runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkd.models import DetectorTeacher, load_detector

FAMILIES = ["fasterrcnn", "retinanet", "fcos"]
IMAGES = [torch.rand(3, 50, 70), torch.rand(3, 80, 60)]  # which are padded to one shape


def build(family: str) -> nn.Module:
    torch.manual_seed(1)
    name = f"{family}/timm/test_resnet"
    return load_detector(name, num_classes=3, min_size=(64,), max_size=96, fpn_channels=64).eval()


@pytest.fixture(params=FAMILIES)
def detector(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


class Seen:
    """What the detector's modules were called with and returned, by name."""

    def __init__(self, detector: nn.Module) -> None:
        self.calls: list[str] = []
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.handles = []
        for name, module in detector.named_modules():
            self.handles.append(
                module.register_forward_hook(lambda _, args, out, name=name: self.keep(name, args, out))
            )

    def keep(self, name: str, args: Any, out: Any) -> None:
        self.calls.append(name)
        self.inputs[name], self.outputs[name] = args, out


def test_features_are_the_detectors_and_no_head_runs(detector: nn.Module) -> None:
    seen = Seen(detector)
    detector(IMAGES)
    batch = seen.outputs["transform"][0]
    whole = dict(seen.outputs)
    seen.calls.clear()
    teacher = DetectorTeacher(detector, heads=False)
    features = teacher(batch.tensors, batch.image_sizes)
    assert list(features) == list(whole["backbone"])
    assert all(torch.equal(features[level], whole["backbone"][level]) for level in features)
    assert {name.partition(".")[0] for name in seen.calls} == {"backbone"}
    assert all(name.startswith("backbone.") for name in teacher.state_dict())


@pytest.mark.parametrize("training", [False, True])
def test_head_outputs_are_the_detectors(detector: nn.Module, training: bool) -> None:
    seen = Seen(detector)
    targets = [{"boxes": torch.tensor([[5.0, 6.0, 40.0, 44.0]]), "labels": torch.tensor([2])}] * 2
    detector.train(training)
    detector.backbone.eval()  # whose statistics would differ between the two calls
    detector(IMAGES, targets if training else None)
    batch, whole, inputs = seen.outputs["transform"][0], dict(seen.outputs), dict(seen.inputs)
    seen.calls.clear()
    proposals = inputs["roi_heads.box_roi_pool"][1] if "roi_heads.box_roi_pool" in inputs else None
    teacher = DetectorTeacher(detector, heads=True)
    with torch.no_grad():
        outputs = teacher(batch.tensors, batch.image_sizes, proposals)
    if proposals is None:
        expected: dict[str, Tensor] = whole["head"]
    else:
        assert inputs["roi_heads.box_roi_pool"][2] == batch.image_sizes
        logits, boxes = whole["roi_heads.box_predictor"]
        expected = {"class_logits": logits, "bbox_regression": boxes}
    assert list(outputs) == [*whole["backbone"], *expected]
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)
    assert not {"", "transform", "rpn", "rpn.head", "anchor_generator", "roi_heads"} & set(seen.calls)
    assert {name for name in seen.calls if "." not in name} <= {"backbone", "head"}
    assert not any(tensor.requires_grad for tensor in outputs.values())


def test_stays_in_evaluation_mode(detector: nn.Module) -> None:
    teacher = DetectorTeacher(detector.train(), heads=True)
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    proposals = [torch.tensor([[1.0, 2.0, 30.0, 40.0]]), torch.zeros(0, 4)]
    outputs = teacher(torch.rand(2, 3, 64, 96), proposals=proposals)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    if teacher.needs_proposals:
        assert outputs["class_logits"].shape == (1, 4)
        assert outputs["bbox_regression"].shape == (1, 16)


def test_a_single_map_is_level_0() -> None:
    detector = nn.Module()
    detector.backbone = nn.Conv2d(3, 4, 1)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(DetectorTeacher(detector, heads=False)(images)["0"], detector.backbone(images))


def test_refusals() -> None:
    images = torch.rand(2, 3, 64, 64)
    teacher = DetectorTeacher(build("fasterrcnn"), heads=True)
    with pytest.raises(ValueError, match="0 lists of proposals for 2 images"):
        teacher(images)
    with pytest.raises(ValueError, match="1 lists of proposals for 2 images"):
        teacher(images, proposals=[torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="3 image_sizes for 2 images"):
        teacher(images, image_sizes=[(64, 64)] * 3)
    with pytest.raises(ValueError, match="Linear has no module 'backbone'"):
        DetectorTeacher(nn.Linear(2, 2), heads=False)
    bare = nn.Module()
    bare.backbone = nn.Identity()
    with pytest.raises(ValueError, match="only its features can be distilled"):
        DetectorTeacher(bare, heads=True)
