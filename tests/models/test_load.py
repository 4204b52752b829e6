"""Names, sources and weights: what `load_model` takes, and what it says of the rest."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffkd.models import load_model, model_names


def test_cifar_by_name() -> None:
    model = load_model("cifar/resnet8", num_classes=10, in_channels=1)
    assert model.training
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert load_model("cifar/resnet8")(torch.randn(2, 3, 32, 32)).shape == (2, 100)


def test_weights_are_loaded(tmp_path: Path) -> None:
    source = load_model("cifar/resnet8", num_classes=10)
    file = tmp_path / "student.safetensors"
    save_file(source.state_dict(), file)
    loaded = load_model("cifar/resnet8", num_classes=10, weights=file).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in source.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "student.safetensors"
    save_file(load_model("cifar/resnet8", num_classes=10).state_dict(), file)
    with pytest.raises(ValueError, match=r"fc\.weight"):
        load_model("cifar/resnet8", num_classes=11, weights=file)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_model("cifar/resnet8", weights=tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar/resnet21", "nearest: 'resnet20'|nearest: .*'resnet20'"),
        ("cifar/", "is unknown; nothing is close"),
        ("timn/resnet18", "no known source; nearest: 'timm/resnet18'"),
        ("resnet20x", r"no known source; nearest: .*'cifar/resnet20'.*Write cifar/NAME"),
        ("resnet20", r"no known source; write cifar/resnet20$"),
        ("ResNet18", r"no known source; write timm/resnet18 or torchvision/resnet18$"),
        ("", "no known source"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no published weights"):
        load_model("cifar/resnet20", pretrained=True)
    with pytest.raises(ValueError, match="cannot start from both"):
        load_model("timm/resnet18", pretrained=True, weights=tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="num_classes 0"):
        load_model("cifar/resnet20", num_classes=0)
    with pytest.raises(ValueError, match="in_channels -1"):
        load_model("cifar/resnet20", in_channels=-1)


def test_names_are_listed_by_their_beginning() -> None:
    assert "timm/resnet18" in model_names("timm")
    assert "torchvision/resnet18" in model_names("torchvision")
    assert model_names("torchvision/resnet1") == [
        "torchvision/resnet101",
        "torchvision/resnet152",
        "torchvision/resnet18",
    ]
    assert not [name for name in model_names("torchvision") if "rcnn" in name or "deeplab" in name]
    with pytest.raises(ValueError, match="'hf' cannot be listed"):
        model_names("hf")


@pytest.mark.parametrize(("name", "kind"), [("smp/unet/resnet18", "segmenter"), ("fcos/resnet18", "detector")])
def test_models_of_other_tasks_are_named_as_such(name, kind):
    with pytest.raises(ValueError, match=f"is a {kind}, and a classifier is wanted"):
        load_model(name, num_classes=3)
