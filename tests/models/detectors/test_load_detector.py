"""Detectors by name: what `load_detector` builds, and what it says of the rest."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from diffkd.files.weights import save_student
from diffkd.models import load_detector

SMALL = {"min_size": (64,), "max_size": 96, "fpn_channels": 64}


def images_and_targets(label: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two images of different shapes, one with an object of `label`, one without."""
    some = {"boxes": torch.tensor([[5.0, 6.0, 50.0, 40.0]]), "labels": torch.tensor([label])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return [torch.rand(3, 50, 70), torch.rand(3, 80, 60)], [some, none]


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn/resnet18",
        "retinanet/mobilenet_v3_small",
        "fcos/timm/test_efficientnet",
        "retinanet/timm/test_mambaout",  # whose maps are (B, H, W, C)
        "fcos/timm/test_vit",  # which has one stride only
    ],
)
def test_trains_and_detects_all_classes(name: str) -> None:
    detector = load_detector(name, num_classes=4, **SMALL)
    images, targets = images_and_targets(4)
    losses = detector(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not [name for name, p in detector.named_parameters() if p.grad is None]
    found = detector.eval()(images)
    assert [set(one) for one in found] == [{"boxes", "labels", "scores"}] * 2
    assert all(((one["labels"] >= 1) & (one["labels"] <= 4)).all() for one in found)


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_label_0_is_never_found(family: str) -> None:
    detector = load_detector(f"{family}/timm/test_resnet", num_classes=2, **SMALL).eval()
    detector.score_thresh = 1e-3
    found = detector(images_and_targets(1)[0])[0]
    assert len(found["labels"]) > 0
    assert set(found["labels"].tolist()) <= {1, 2}


@pytest.mark.parametrize("family", ["fasterrcnn", "retinanet", "fcos"])
def test_resnet50_is_torchvisions_own_detector(family: str) -> None:
    with torch.device("meta"):
        own = load_detector(f"{family}/resnet50", num_classes=90)
        published = detection.__dict__[f"{family}_resnet50_fpn"](weights_backbone=None)
    assert {k: v.shape for k, v in own.state_dict().items()} == {k: v.shape for k, v in published.state_dict().items()}
    assert repr(own.transform) == repr(published.transform)
    if family == "fcos":
        assert own.center_sampling_radius == published.center_sampling_radius


@pytest.mark.parametrize(
    ("name", "keys", "strides"),
    [
        ("fasterrcnn/resnet18", ["0", "1", "2", "3", "pool"], [4, 8, 16, 32, 64]),
        ("fasterrcnn/mobilenet_v2", ["0", "1", "2", "3", "pool"], [4, 8, 16, 32, 64]),
        ("retinanet/timm/test_convnext", ["0", "1", "2", "p6", "p7"], [8, 16, 32, 64, 128]),
        ("fcos/timm/test_vit", ["0", "p6", "p7"], [16, 32, 64]),
    ],
)
def test_levels(name: str, keys: list[str], strides: list[int]) -> None:
    backbone = load_detector(name, num_classes=1, **SMALL).backbone.eval()
    levels = backbone(torch.zeros(1, 3, 128, 256))
    assert list(levels) == keys
    assert [tuple(level.shape) for level in levels.values()] == [(1, 64, 128 // s, 256 // s) for s in strides]


def test_every_object_has_a_positive_in_small_images() -> None:
    """FCOS would leave objects of small images without positives if the radius shrank with the anchors."""
    detector = load_detector("fcos/timm/test_convnext", num_classes=1, min_size=(96,), max_size=96, fpn_channels=64)
    for size in (10.0, 20.0, 40.0, 80.0):
        target = {"boxes": torch.tensor([[9.0, 11.0, 9 + size, 11 + size]]), "labels": torch.tensor([1])}
        assert detector([torch.rand(3, 96, 96)], [target])["bbox_regression"] > 0


def test_normalization_and_sizes_are_the_transforms() -> None:
    detector = load_detector(
        "retinanet/timm/test_resnet", num_classes=1, min_size=(64, 160), max_size=200, mean=(0, 0, 0), std=(1, 1, 0.5)
    ).eval()
    image = torch.rand(3, 160, 160)
    batch, _ = detector.transform([image])
    assert batch.image_sizes == [(160, 160)]
    assert torch.allclose(batch.tensors[0, :, :160, :160], image / torch.tensor([1, 1, 0.5])[:, None, None])
    assert detector.anchor_generator.sizes[0][0] == 32 * 160 / 800
    assert load_detector("retinanet/timm/test_resnet", num_classes=1, anchor_scale=0.5).anchor_generator.sizes[0] == (
        *(16.0, 20.0, 25.0),
    )


@pytest.mark.parametrize("backbone", ["resnet18", "timm/test_efficientnet"])
@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
def test_norms_are_known_again_from_a_file(backbone: str, norm: str, tmp_path: Path) -> None:
    detector = load_detector(f"retinanet/{backbone}", num_classes=2, norm=norm, **SMALL)
    norms = [module for module in detector.backbone.body.modules() if "Norm" in type(module).__name__]
    assert len(norms) > 10
    assert all(isinstance(module, nn.BatchNorm2d) == (norm == "batch") for module in norms)
    assert all(isinstance(module, nn.GroupNorm) == (norm == "group") for module in norms)
    images, targets = images_and_targets(2)
    detector(images, targets)
    file = save_student(detector, tmp_path / "detector.safetensors")
    same = load_detector(f"retinanet/{backbone}", num_classes=2, weights=file, **SMALL).eval()
    batch = torch.rand(1, 3, 64, 64)
    assert torch.equal(detector.eval().backbone(batch)["0"], same.backbone(batch)["0"])


def test_pretrained_backbone_is_frozen_or_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    classifier = torchvision.models.resnet18()
    nn.init.normal_(classifier.bn1.running_mean)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    torch.save(classifier.state_dict(), tmp_path / "hub" / "checkpoints" / Path(url).name)
    for norm, kind in (("auto", FrozenBatchNorm2d), ("batch", nn.BatchNorm2d)):
        detector = load_detector("fcos/resnet18", num_classes=1, pretrained_backbone=True, norm=norm, **SMALL)
        assert type(detector.backbone.body.bn1) is kind
        assert torch.equal(detector.backbone.body.bn1.running_mean, classifier.bn1.running_mean)
        assert torch.equal(detector.backbone.body.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)
        assert all(p.requires_grad for p in detector.parameters())
    with pytest.raises(ValueError, match="'group' would discard"):
        load_detector("fcos/resnet18", num_classes=1, pretrained_backbone=True, norm="group")


def test_functions_get_what_they_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def build(num_classes, min_size, std, **rest):\n"
        "    model = nn.Identity()\n"
        "    model.seen = (num_classes, min_size, std, rest)\n"
        "    return model\n"
    )
    detector = load_detector(f"{file}:build", num_classes=3, min_size=[64], std=(1, 1, 2))
    assert detector.seen == (3, (64,), (1, 1, 2), {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fasterrcnn/resnet19", r"nearest: .*'resnet18'"),
        ("fasterrcnn/vgg16", r"timm may have it as 'timm/vgg16'"),
        ("fasterrcnn/timm/resnet19", r"unknown to timm .*nearest: .*'resnet18'"),
        ("retinanet/", "nothing is close to it"),
        ("fastrcnn/resnet18", r"nearest: 'fasterrcnn/resnet18'.*Write fasterrcnn/BACKBONE"),
        ("timm/resnet18", "is a classifier: as a backbone it is 'fasterrcnn/timm/resnet18', 'retinanet/timm/resnet18'"),
        ("resnet18", "is a classifier: as a backbone it is 'fasterrcnn/resnet18'"),
        ("torchvision/resnet18", "is a classifier: give 'fasterrcnn/resnet18'"),
        ("torchvision/ssd300_vgg16", "one fixed size of its own; known: 'torchvision/fasterrcnn_"),
        ("torchvision/maskrcnn_resnet50_fpn", "learns from masks"),
        ("torchvision/fcos_resnet51_fpn", "nearest: 'fcos_resnet50_fpn'"),
        ("torchvision/fcos_resnet50_fpn.COCO_V9", r"known: 'torchvision/fcos_resnet50_fpn\.COCO_V1'"),
        ("cifar/resnet20", "is no detector: take 'fasterrcnn/resnet18'"),
        ("", "no known source"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_detector(name, num_classes=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes 0"),
        ({"pretrained": True}, "no published weights: .*pretrained_backbone"),
        ({"pretrained": True, "weights": "x.pt"}, "cannot start from both"),
        ({"min_size": ()}, "no size of images"),
        ({"min_size": (800, 0)}, "no size of images"),
        ({"min_size": (800,), "max_size": 700}, "none above max_size"),
        ({"mean": (0.5,)}, "must be 3 numbers"),
        ({"std": (1, 0, 1)}, "above 0"),
        ({"anchor_scale": 0.0}, "anchor_scale 0.0"),
        ({"anchor_scale": float("nan")}, "anchor_scale nan"),
        ({"fpn_channels": 0}, "fpn_channels 0"),
        ({"fpn_channels": 32}, "32 groups of at least 2 channels"),
        ({"fpn_channels": 40}, "fpn_channels 40 do not suit fcos.*such as 64"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_detector("fcos/resnet18", **{"num_classes": 3, **arguments})


def test_missing_weights_are_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_detector("fcos/resnet18", num_classes=1, weights="nowhere.safetensors")
