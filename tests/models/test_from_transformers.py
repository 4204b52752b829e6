import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, ResNetConfig, ResNetForImageClassification

from diffkd.models import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=6)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    return tmp_path


def test_random_weights_need_the_configuration_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = load_model(f"hf/{folder}", num_classes=3, in_channels=1)
    assert model.training
    assert model(torch.randn(2, 1, 32, 32)).logits.shape == (2, 3)


def test_pretrained_weights(folder: Path) -> None:
    model = load_model(f"hf/{folder}", pretrained=True)
    same = ResNetForImageClassification.from_pretrained(folder)
    assert model.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 6)


@pytest.mark.parametrize("pretrained", [False, True])
def test_half_precision_files_become_float32(folder: Path, pretrained: bool) -> None:
    ResNetForImageClassification.from_pretrained(folder).half().save_pretrained(folder)
    model = load_model(f"hf/{folder}", pretrained=pretrained)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_replaced_classifier_is_announced(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"classifier\.1\.bias, classifier\.1\.weight start from random") as seen:
        model = load_model(f"hf/{folder}", pretrained=True, num_classes=3)
    assert seen[0].filename == __file__
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 3)


def test_pickles_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors") as error:
        load_model(f"hf/{folder}", pretrained=True)
    assert "\n" not in str(error.value)


def test_code_beside_the_model_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil: ...\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hf/"):
        load_model(f"hf/{folder}")
    assert not (folder / "ran").exists()


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights are for 3"):
        load_model(f"hf/{folder}", pretrained=True, in_channels=1)
    with pytest.raises(ValueError, match="no readable configuration"):
        load_model(f"hf/{tmp_path / 'nowhere'}")
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="must be an image classifier") as error:
        load_model(f"hf/{tmp_path / 'bert'}")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no num_channels"):
        load_model(f"hf/{tmp_path / 'bert'}", in_channels=1)
