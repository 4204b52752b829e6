from pathlib import Path

import pytest
import torch
import torchvision

from diffkd.models import load_model


def test_random_weights() -> None:
    model = load_model("torchvision/shufflenet_v2_x0_5", num_classes=7, in_channels=3).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_googlenet_returns_one_tensor_in_training() -> None:
    model = load_model("torchvision/googlenet", num_classes=3)
    assert model.training
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Put random weights where torchvision keeps those it has fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    state: dict[str, torch.Tensor] = torchvision.models.squeezenet1_1().state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / Path(weights.url).name)
    return state


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "torchvision/squeezenet1_1.IMAGENET1K_V1"])
def test_pretrained_weights(published: dict[str, torch.Tensor], name: str) -> None:
    model = load_model(name, pretrained=True, num_classes=1000)
    assert all(torch.equal(value, published[key]) for key, value in model.state_dict().items())


def test_replaced_classifier_is_announced(published: dict[str, torch.Tensor]) -> None:
    with pytest.warns(UserWarning, match=r"classifier\.1 starts from random weights.* 1000 classes and 5") as seen:
        model = load_model("torchvision/squeezenet1_1", pretrained=True, num_classes=5)
    assert seen[0].filename == __file__
    state = model.state_dict()
    assert state["classifier.1.weight"].shape[0] == 5
    assert all(torch.equal(value, state[key]) for key, value in published.items() if not key.startswith("classifier"))
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "in_channels", "message"),
    [
        ("torchvision/resnet19", None, "nearest: .*'resnet18'.*lists all"),
        ("torchvision/fasterrcnn_resnet50_fpn", None, "no classifier of torchvision"),
        ("torchvision/resnet50.IMAGENET1K_V3", None, r"known: 'torchvision/resnet50\.IMAGENET1K_V1'"),
        ("torchvision/resnet18", 1, "takes 3 input channels, not 1: repeat the channels"),
    ],
)
def test_refusals(name: str, in_channels: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(name, in_channels=in_channels)
    assert "\n" not in str(error.value)
