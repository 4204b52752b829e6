import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffkd.models import load_model


def test_random_weights() -> None:
    model = load_model("timm/test_resnet", num_classes=7, in_channels=1).eval()
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    assert load_model("timm/test_resnet.r160_in1k").num_classes == 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(load_model("timm/test_resnet", num_classes=12).state_dict(), tmp_path / "model.safetensors")
    published = {"num_classes": 12, "input_size": [3, 64, 64], "first_conv": "conv1.0", "classifier": "fc"}
    config = {"architecture": "test_resnet", "num_classes": 12, "pretrained_cfg": published}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_pretrained_weights(folder: Path) -> None:
    model = load_model(f"timm/local-dir:{folder}", pretrained=True)
    torch.manual_seed(0)
    same = load_model("timm/test_resnet", num_classes=12)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())


def test_replaced_classifier_is_announced(folder: Path) -> None:
    whole = load_model(f"timm/local-dir:{folder}", pretrained=True, num_classes=12)
    with pytest.warns(
        UserWarning, match="classifier fc starts from random weights.* 12 classes and 5 were asked"
    ) as seen:
        model = load_model(f"timm/local-dir:{folder}", pretrained=True, num_classes=5)
    assert seen[0].filename == __file__
    assert model.fc.out_features == 5
    assert torch.equal(model.state_dict()["conv1.0.weight"], whole.state_dict()["conv1.0.weight"])


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("timm/resnet19", False, "nearest: .*'resnet18'.*lists all"),
        ("timm/resnet18.a9_in1k", False, r"no such pretrained weights; resnet18 has .*'timm/resnet18\.a1_in1k'"),
        ("timm/resnet18d_does_not_exist.a1", True, "is unknown to timm"),
    ],
)
def test_unknown_names(name: str, pretrained: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(name, pretrained=pretrained)
    assert "\n" not in str(error.value)
