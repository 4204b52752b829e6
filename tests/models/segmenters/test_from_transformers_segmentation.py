import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    ConvNextConfig,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    UperNetConfig,
)

from diffkd.models import AnySize, load_segmenter, stride_of

SMALL = SegformerConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], decoder_hidden_size=16, num_labels=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    SegformerForSemanticSegmentation(SMALL).save_pretrained(tmp_path)
    return tmp_path


def test_random_weights_need_the_configuration_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = load_segmenter(f"hf/{folder}", num_classes=3, in_channels=1)
    assert model.training
    assert model(torch.randn(2, 1, 64, 32)).logits.shape == (2, 3, 16, 8)
    assert AnySize(model)(torch.randn(2, 1, 45, 7)).shape == (2, 3, 45, 7)


def test_pretrained_weights(folder: Path) -> None:
    model = load_segmenter(f"hf/{folder}", num_classes=6, pretrained=True)
    same = SegformerForSemanticSegmentation.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.items())
    with pytest.warns(UserWarning, match=r"classifier\.bias, .*classifier\.weight start from random"):
        model = load_segmenter(f"hf/{folder}", num_classes=3, pretrained=True)
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 3, 8, 8)


def test_the_encoder_of_a_classifier(tmp_path: Path) -> None:
    classifier = SegformerForImageClassification(SMALL)
    classifier.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"decode_head\..* start from random weights"):
        model = load_segmenter(f"hf/{tmp_path}", num_classes=3, pretrained=True)
    own, first = model.state_dict(), next(key for key in classifier.state_dict() if key.startswith("segformer."))
    assert torch.equal(own[first], classifier.state_dict()[first])


def test_a_segmenter_around_another_model(tmp_path: Path) -> None:
    backbone = ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=[f"stage{i}" for i in range(1, 5)])
    UperNetConfig(backbone_config=backbone, hidden_size=16, pool_scales=[1, 2]).save_pretrained(tmp_path)
    model = load_segmenter(f"hf/{tmp_path}", num_classes=3, in_channels=1)
    assert model(torch.randn(2, 1, 64, 64)).logits.shape == (2, 3, 64, 64)
    assert stride_of(model) == 32
    # Its auxiliary head would get no gradient, as the loss is computed outside.
    assert not any("auxiliary" in name for name, _ in model.named_parameters())


def test_code_beside_the_model_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForSemanticSegmentation": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hf/"):
        load_segmenter(f"hf/{folder}", num_classes=3)
    assert not (folder / "ran").exists()


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set pretrained, .* hf/nvidia/mit-b0"):
        load_segmenter(f"hf/{folder}", num_classes=3, pretrained_backbone=True)
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="must be a semantic segmenter") as error:
        load_segmenter(f"hf/{tmp_path / 'bert'}", num_classes=3)
    assert "\n" not in str(error.value)
