import json
from pathlib import Path

import pytest
from torch import nn
from transformers import ResNetConfig

from diffkd.models import input_normalization, load_model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/resnet18.a1_in1k", IMAGENET),
        ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", HALF),
        ("torchvision/squeezenet1_1", IMAGENET),
        ("torchvision/squeezenet1_1.IMAGENET1K_V1", IMAGENET),
        ("cifar/resnet8", None),
        ("torch.nn:Identity", None),
    ],
)
def test_published_normalisation(name: str, expected: object) -> None:
    assert input_normalization(load_model(name), name) == expected


def test_each_torchvision_model_has_its_own() -> None:
    assert input_normalization(nn.Identity(), "torchvision/efficientnet_v2_l") == HALF


def test_greyscale_models_have_none() -> None:
    assert input_normalization(load_model("timm/test_resnet", in_channels=1), "timm/test_resnet") is None


def test_transformers(tmp_path: Path) -> None:
    ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic").save_pretrained(tmp_path)
    name = f"hf/{tmp_path}"
    model = load_model(name)
    assert input_normalization(model, name) is None
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert input_normalization(model, name) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}))
    assert input_normalization(model, name) is None


def test_files_in_a_folder_called_like_a_source() -> None:
    assert input_normalization(nn.Identity(), "timm/mine.py:build") is None
