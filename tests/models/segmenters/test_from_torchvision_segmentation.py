from pathlib import Path

import pytest
import torch
import torchvision

from diffkd.models import load_segmenter

LRASPP = "torchvision/lraspp_mobilenet_v3_large"
DEEPLAB = "torchvision/deeplabv3_mobilenet_v3_large"


@pytest.mark.parametrize("name", [LRASPP, DEEPLAB])
def test_random_weights(name: str) -> None:
    model = load_segmenter(name, num_classes=5)
    assert model.training
    outputs = model.eval()(torch.randn(1, 3, 33, 47))
    assert {key: value.shape for key, value in outputs.items()} == {"out": (1, 5, 33, 47)}


def test_auxiliary_head() -> None:
    outputs = load_segmenter(DEEPLAB, num_classes=5, auxiliary=True)(torch.randn(2, 3, 32, 32))
    assert {key: value.shape for key, value in outputs.items()} == {"out": (2, 5, 32, 32), "aux": (2, 5, 32, 32)}
    with pytest.raises(ValueError, match="no auxiliary head"):
        load_segmenter(LRASPP, num_classes=5, auxiliary=True)


def test_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes 3 input channels, not 1.*smp/"):
        load_segmenter(LRASPP, num_classes=5, in_channels=1)


def publish(folder: Path, builder: str, weights: object) -> dict[str, torch.Tensor]:
    """Put random weights where torchvision keeps those it has fetched."""
    state: dict[str, torch.Tensor] = builder_state(builder)
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, folder / "hub" / "checkpoints" / Path(weights.url).name)
    return state


def builder_state(builder: str) -> dict[str, torch.Tensor]:
    options = {"aux_loss": True} if builder.startswith("deeplab") else {}
    state: dict[str, torch.Tensor] = torchvision.models.get_model(
        builder, weights_backbone=None, num_classes=21, **options
    ).state_dict()
    return state


def test_pretrained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.segmentation.DeepLabV3_MobileNet_V3_Large_Weights.DEFAULT
    state = publish(tmp_path, "deeplabv3_mobilenet_v3_large", weights)
    whole = load_segmenter(DEEPLAB, num_classes=21, pretrained=True, auxiliary=True).state_dict()
    assert whole.keys() == state.keys()
    assert all(torch.equal(value, whole[key]) for key, value in state.items())
    # Without the auxiliary head the names are those of a model that was built without, so that its file loads.
    plain = load_segmenter(DEEPLAB, num_classes=21, pretrained=True, pretrained_backbone=True)
    assert plain.state_dict().keys() == load_segmenter(DEEPLAB, num_classes=21).state_dict().keys()
    assert list(plain.eval()(torch.randn(1, 3, 32, 32))) == ["out"]


def test_replaced_classifier_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.segmentation.LRASPP_MobileNet_V3_Large_Weights.DEFAULT
    state = publish(tmp_path, "lraspp_mobilenet_v3_large", weights)
    with pytest.warns(UserWarning, match=r"classifier\.low_classifier, .*high_classifier .*21 classes and 5") as seen:
        model = load_segmenter(LRASPP, num_classes=5, pretrained=True)
    assert seen[0].filename == __file__
    own = model.state_dict()
    kept = [key for key in state if not key.startswith(("classifier.low", "classifier.high"))]
    assert all(torch.equal(state[key], own[key]) for key in kept)
    assert model.eval()(torch.randn(1, 3, 32, 32))["out"].shape == (1, 5, 32, 32)


def test_pretrained_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1
    state = torchvision.models.mobilenet_v3_large().state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / Path(weights.url).name)
    own = load_segmenter(LRASPP, num_classes=2, pretrained_backbone=True).state_dict()
    assert torch.equal(own["backbone.0.0.weight"], state["features.0.0.weight"])
