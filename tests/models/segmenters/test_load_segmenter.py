from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffkd.models import load_segmenter
from diffkd.models.segmenters.any_size import class_map

WRITTEN = """
from torch import nn

def plain(num_classes, in_channels):
    return nn.Conv2d(in_channels, num_classes, 1)

def with_switches(num_classes, pretrained_backbone=False, auxiliary=False):
    net = nn.Conv2d(3, num_classes, 1)
    net.asked = (pretrained_backbone, auxiliary)
    return net
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(WRITTEN)
    return tmp_path / "mine.py"


def test_a_file_of_the_users_own(written: Path) -> None:
    model = load_segmenter(f"{written}:plain", num_classes=4, in_channels=2)
    assert model(torch.randn(1, 2, 8, 8)).shape == (1, 4, 8, 8)
    model = load_segmenter(f"{written}:with_switches", num_classes=4, pretrained_backbone=True)
    assert model.asked == (True, False)
    with pytest.raises(ValueError, match="'plain' takes no argument auxiliary"):
        load_segmenter(f"{written}:plain", num_classes=4, auxiliary=True)


def test_weights_are_loaded_strictly(written: Path, tmp_path: Path) -> None:
    name, file = f"{written}:plain", tmp_path / "weights.safetensors"
    weights = {"weight": torch.randn(4, 3, 1, 1), "bias": torch.randn(4)}
    save_file(weights, file)
    assert torch.equal(load_segmenter(name, num_classes=4, weights=file).state_dict()["bias"], weights["bias"])
    with pytest.raises(ValueError, match=r"bias is \(4,\) there, \(5,\) here"):
        load_segmenter(name, num_classes=5, weights=file)
    with pytest.raises(FileNotFoundError, match=r"no file .*absent"):
        load_segmenter(name, num_classes=4, weights=tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="both"):
        load_segmenter(name, num_classes=4, weights=file, pretrained=True)


def test_weights_make_the_backbones_needless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torchvision/lraspp_mobilenet_v3_large"
    file = tmp_path / "weights.safetensors"
    saved = load_segmenter(name, num_classes=2)
    save_file(saved.state_dict(), file)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    model = load_segmenter(name, num_classes=2, weights=file, pretrained_backbone=True)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in saved.state_dict().items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet18", "'timm/resnet18' is a classifier.* smp/DeepLabV3Plus/timm/resnet18"),
        ("cifar/resnet20", "classifier of small images.* smp/DeepLabV3Plus/resnet18"),
        ("torchvision/resnet18", "is a classifier.* torchvision/deeplabv3"),
        ("torchvision/fasterrcnn_resnet50_fpn", "is a detector.* torchvision/deeplabv3"),
        ("torchvision/deeplabv3_resnet51", "nearest: 'deeplabv3_resnet50'"),
        ("torchvision/fcn_resnet50.IMAGENET1K_V1", r"known: 'torchvision/fcn_resnet50\.COCO_WITH_VOC_LABELS_V1'"),
        ("smb/Unet/resnet18", "no known source; nearest: 'smp/Unet/resnet18'.*Write smp/ARCH/ENCODER"),
        ("", "no known source"),
        ("deeplabv3_resnet50", "no known source; write torchvision/deeplabv3_resnet50$"),
    ],
)
def test_names_that_are_no_segmenters(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_segmenter(name, num_classes=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
def test_nothing_to_work_on(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} 0 leaves"):
        load_segmenter("smp/Unet/resnet18", **{"num_classes": 3, argument: 0})


@pytest.mark.parametrize("name", ["smp/Unet/resnet18", "hf/nowhere"])
def test_auxiliary_only_where_there_is_one(name: str) -> None:
    with pytest.raises(ValueError, match="no second class map"):
        load_segmenter(name, num_classes=3, auxiliary=True)


def test_class_map_refuses_what_is_none() -> None:
    assert class_map({"out": torch.zeros(1, 2, 3, 3), "aux": torch.ones(1, 2, 3, 3)}).sum() == 0
    with pytest.raises(TypeError, match=r"shape \(1, 10\) instead of a class map"):
        class_map(torch.zeros(1, 10))
    with pytest.raises(TypeError, match="returned NoneType"):
        class_map(None)
    with pytest.raises(TypeError, match=r"shape \(1, 2, 3, 3\) instead of a class map of 4 classes"):
        class_map(torch.zeros(1, 2, 3, 3), 4)
