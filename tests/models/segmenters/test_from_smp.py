import sys

import pytest
import segmentation_models_pytorch as smp
import torch

from diffkd.models import load_segmenter


@pytest.mark.parametrize(
    "name",
    [
        "smp/DeepLabV3Plus/resnet18",
        "smp/pspnet/mobilenet_v2",
        "smp/FPN/timm/test_resnet",
        "smp/UNET/tu-test_resnet.r160_in1k",
        "smp/segformer/mit_b0",
        "smp/DPT/timm/test_vit",
    ],
)
def test_architectures_and_encoders(name: str) -> None:
    model = load_segmenter(name, num_classes=5)
    assert model.training
    assert model.eval()(torch.randn(1, 3, 64, 32)).shape == (1, 5, 64, 32)


def test_other_channels() -> None:
    assert load_segmenter("smp/Unet/timm/test_resnet", num_classes=2, in_channels=5).eval()(
        torch.randn(1, 5, 32, 32)
    ).shape == (1, 2, 32, 32)


@pytest.mark.parametrize(
    ("encoder", "weights"),
    [("resnet18", "imagenet"), ("resnext101_32x16d", "instagram"), ("timm/resnet18.a1_in1k", True)],
)
def test_published_encoders(encoder: str, weights: object, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        smp, "create_model", lambda *arguments, **options: asked.append(arguments) or torch.nn.Identity()
    )
    load_segmenter(f"smp/Unet/{encoder}", num_classes=3, pretrained_backbone=True)
    assert asked == [("Unet", encoder.replace("timm/", "tu-"), weights, 3, 3)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smp/UnetPlus/resnet18", "unknown architecture 'UnetPlus'; nearest: 'unetplusplus'.*with one of Unet,"),
        ("smp/Unet", "has no encoder: write smp/Unet/resnet18"),
        ("smp/Unet/", "has no encoder"),
        ("smp/Unet/resnet19", "unknown encoder 'resnet19'; nearest: .*'resnet18'.*timm/NAME"),
        ("smp/Unet/timm/test_resnett", "timm .* has no 'test_resnett'; nearest: .*'test_resnet'"),
        ("smp/Unet/timm/resnet18.nowhere", r"no such weights.*'resnet18\.a1_in1k'"),
        ("smp/Unet/timm/test_vit", "cannot be built .*Unsupported model downsampling.*another encoder"),
        ("smp/DPT/resnet18", "cannot be built .*Only Timm encoders"),
    ],
)
def test_refusals(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_segmenter(name, num_classes=3)
    assert "\n" not in str(error.value)


def test_weights_of_the_whole_are_not_published() -> None:
    with pytest.raises(ValueError, match="set pretrained_backbone"):
        load_segmenter("smp/Unet/resnet18", num_classes=3, pretrained=True)
    with pytest.raises(ValueError, match="no published weights: set pretrained_backbone to False"):
        load_segmenter("smp/Unet/timm/resnetblur18", num_classes=3, pretrained_backbone=True)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
            if fullname.partition(".")[0] == "segmentation_models_pytorch":
                raise ModuleNotFoundError("absent", name="segmentation_models_pytorch")

    for module in [module for module in sys.modules if module.startswith("segmentation_models_pytorch")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=r"'smp/Unet/resnet18' needs .* pip install 'diffkd\[segmentation\]'"):
        load_segmenter("smp/Unet/resnet18", num_classes=3)
