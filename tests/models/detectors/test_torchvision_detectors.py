from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from diffkd.models import load_detector
from diffkd.models.detectors.from_torchvision import torchvision_detector_names


@pytest.mark.parametrize("name", torchvision_detector_names())
def test_all_are_built_with_one_column_for_the_background(name: str) -> None:
    with torch.device("meta"):
        detector = load_detector(f"torchvision/{name}", num_classes=6, mean=(0, 0, 0))
    shapes = {tuple(v.shape) for k, v in detector.state_dict().items() if k.endswith(("cls_score.bias", "logits.bias"))}
    anchors = 9 if name.startswith("retinanet") else 1
    assert (7 * anchors,) in shapes
    assert detector.transform.image_mean == [0, 0, 0]


def test_replaced_layers_are_announced_and_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with torch.device("meta"):
        shapes = detection.fcos_resnet50_fpn(weights_backbone=None).state_dict()
    published = {
        key: torch.randn(value.shape[0]).abs() if value.ndim == 1 else torch.full(value.shape, 1e-3)
        for key, value in shapes.items()
        if value.ndim
    }
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = detection.FCOS_ResNet50_FPN_Weights.COCO_V1.url
    torch.save(published, tmp_path / "hub" / "checkpoints" / Path(url).name)
    with pytest.warns(
        UserWarning, match=r"classification_head\.cls_logits starts from random.* 90 classes and 2"
    ) as seen:
        detector = load_detector(
            "torchvision/fcos_resnet50_fpn", num_classes=2, pretrained=True, min_size=(64,), max_size=64
        )
    assert seen[0].filename == __file__
    state = detector.state_dict()
    changed = [key for key in published if not torch.equal(published[key], state[key])]
    assert changed == ["head.classification_head.cls_logits.weight", "head.classification_head.cls_logits.bias"]
    assert type(detector.backbone.body.bn1) is FrozenBatchNorm2d
    target = {"boxes": torch.tensor([[5.0, 6.0, 50.0, 40.0]]), "labels": torch.tensor([2])}
    assert set(detector([torch.rand(3, 64, 64)], [target])) == {"classification", "bbox_regression", "bbox_ctrness"}
    whole = load_detector("torchvision/fcos_resnet50_fpn", num_classes=90, pretrained=True, norm="batch")
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in published.items())
    assert type(whole.backbone.body.bn1) is nn.BatchNorm2d


def test_refusals() -> None:
    with pytest.raises(ValueError, match="built as published: leave anchor_scale"):
        load_detector("torchvision/fcos_resnet50_fpn", num_classes=1, anchor_scale=0.5)
    with pytest.raises(ValueError, match="'group' would discard"):
        load_detector("torchvision/fcos_resnet50_fpn", num_classes=1, norm="group", pretrained=True)
