import pytest
import torch
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    SiglipTextConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from diffkd.files.fitting import report_of
from diffkd.files.weights import save_student
from diffkd.models import load_backbone, load_model
from diffkd.models.backbones import patch_size, with_positions_of

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
VIT |= {"patch_size": 8}


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("cifar/compact_resnet8", 32, 32),
        ("timm/test_resnet", 96, 32),
        ("torchvision/mobilenet_v3_small", 1024, 64),
        ("torchvision/squeezenet1_1", 512, 64),
    ],
)
def test_the_classifier_is_taken_out(name, channels, size):
    model = load_backbone(name).eval()
    whole = load_model(name, num_classes=7)
    assert model(torch.randn(2, 3, size, size)).flatten(1).shape == (2, channels)
    assert set(model.state_dict()) < set(whole.state_dict())


@pytest.mark.parametrize("name", ["cifar/compact_resnet8", "timm/test_resnet"])
def test_weights_of_the_whole_and_of_the_backbone_alone(name, tmp_path):
    whole = load_model(name, num_classes=7)
    save_student(whole, tmp_path / "whole.safetensors")
    first = load_backbone(name, weights=tmp_path / "whole.safetensors")
    save_student(first, tmp_path / "backbone.safetensors")
    again = load_backbone(name, weights=tmp_path / "backbone.safetensors")
    for model in (first, again):
        assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.state_dict().items())
    assert report_of(again).plain


def test_a_file_of_another_network_is_refused(tmp_path):
    save_student(load_model("cifar/resnet8", num_classes=7), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load_backbone("timm/test_resnet", weights=tmp_path / "other.safetensors")


HEADS = {
    "moco": (lambda name: f"module.encoder_q.{name}", {"module.encoder_q.fc.0.weight": 4, "module.queue": 4}),
    "swav": (lambda name: f"module.{name}", {"module.projection_head.0.weight": 4, "module.prototypes.weight": 3}),
    "mmpretrain": (lambda name: f"backbone.{name}", {"head.fc.weight": 7, "head.fc.bias": 7, "neck.fc0.weight": 4}),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("headless", [True, False], ids=["backbone", "new head"])
def test_heads_of_other_trainings_are_left_out_and_named(kind, headless, tmp_path):
    saved = load_backbone("timm/test_resnet")
    rename, head = HEADS[kind]
    state = {rename(name): value for name, value in saved.state_dict().items()}
    state |= {name: torch.ones((rows, 96) if "weight" in name else rows) for name, rows in head.items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    if headless:
        model = load_backbone("timm/test_resnet", weights=tmp_path / "w.pth")
    else:
        with pytest.warns(UserWarning, match=r"fc\.weight, fc\.bias of ResNet start from random weights"):
            model = load_model("timm/test_resnet", num_classes=2, weights=tmp_path / "w.pth", new_head=True)
        with pytest.raises(ValueError, match=r"(missing fc\.weight|fc\.weight is \(7, 96\) there)"):
            load_model("timm/test_resnet", num_classes=2, weights=tmp_path / "w.pth")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in saved.state_dict().items())
    said = str(report_of(model))
    assert "left out" in said
    for name in head:
        part = name.removeprefix("module.").removeprefix("encoder_q.").partition(".")[0]
        assert part in said


def test_the_decoder_of_a_masked_autoencoder_is_left_out(tmp_path):
    saved = load_backbone("timm/test_vit")
    decoder = {"mask_token": 8, "decoder_pos_embed": 8, "decoder_blocks.0.norm1.weight": 8, "decoder_pred.bias": 8}
    state = {"model": saved.state_dict() | {name: torch.ones(size) for name, size in decoder.items()}}
    torch.save(state, tmp_path / "w.pth")
    model = load_backbone("timm/test_vit", weights=tmp_path / "w.pth")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in saved.state_dict().items())
    assert "left out: decoder_pos_embed, decoder_blocks.0.norm1.weight" in str(report_of(model))
    with pytest.warns(UserWarning, match="start from random weights"):
        load_model("timm/test_vit", num_classes=2, weights=tmp_path / "w.pth", new_head=True)
    torch.save(load_model("timm/test_vit", num_classes=2).state_dict() | state["model"], tmp_path / "w.pth")
    with pytest.raises(ValueError, match="unexpected decoder_pos_embed"):
        load_model("timm/test_vit", num_classes=2, weights=tmp_path / "w.pth")


@pytest.mark.parametrize("extra", ["layer1.9.conv1.weight", "layer5.0.conv1.weight"])
def test_a_deeper_network_is_refused(extra, tmp_path):
    state = load_model("timm/test_resnet", num_classes=7).state_dict()
    torch.save(state | {extra: torch.ones(1)}, tmp_path / "w.pth")
    for load in (load_backbone, lambda name, **options: load_model(name, num_classes=2, new_head=True, **options)):
        with pytest.raises(ValueError, match=f"unexpected {extra}"):
            load("timm/test_resnet", weights=tmp_path / "w.pth")


def test_a_function_of_the_users_own_loses_its_classifier(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    conv = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    return nn.Sequential(conv, nn.Linear(5, num_classes))\n"
    )
    model = load_backbone(f"{tmp_path}/nets.py:net")
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_the_pooler_of_a_checkpoint_without_one_is_taken_out(tmp_path):
    ViTForImageClassification(ViTConfig(**VIT, num_labels=3)).save_pretrained(tmp_path)
    model = load_backbone(f"hf/{tmp_path}", pretrained=True).eval()
    output = model(torch.randn(2, 3, 32, 32))
    assert output.pooler_output is None
    assert output.last_hidden_state.shape == (2, 17, 16)


def test_patches_of_a_masked_autoencoder_stay_in_order(tmp_path):
    ViTMAEForPreTraining(ViTMAEConfig(**VIT, decoder_num_hidden_layers=1, decoder_hidden_size=16)).save_pretrained(
        tmp_path
    )
    model = load_backbone(f"hf/{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images).last_hidden_state, model(images).last_hidden_state)
    assert model(images).last_hidden_state.shape == (2, 17, 16)


def test_of_an_image_text_model_the_vision_tower_is_taken(tmp_path):
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    whole = CLIPModel(CLIPConfig(vision_config=VIT, text_config=text)).eval()
    whole.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    expected = whole.vision_model(images).pooler_output
    published = load_backbone(f"hf/{tmp_path}", pretrained=True).eval()
    filled = load_backbone(f"hf/{tmp_path}", weights=tmp_path / "model.safetensors").eval()
    for model in (published, filled):
        assert torch.equal(model(images).pooler_output, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BertConfig(), r"\(bert\) is given input_ids, .* only images are: name a vision model"),
        (CLIPTextConfig(), r"\(clip_text_model\) is given input_ids, .* only images are: name a vision model"),
        (SiglipTextConfig(), r"\(siglip_text_model\) is no model that AutoModel builds, .* name a vision model"),
    ],
    ids=["text model", "text tower", "text tower without a model of its own"],
)
def test_a_text_model_is_refused_in_one_line(tmp_path, text, message):
    text.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_backbone(f"hf/{tmp_path}")


def test_positions_are_resampled(tmp_path):
    ViTConfig(**VIT).save_pretrained(tmp_path)
    for name in (f"hf/{tmp_path}", "timm/test_vit"):
        model = load_backbone(name).eval()
        assert patch_size(model) is not None
        side = 3 * patch_size(model)[0]
        resized = with_positions_of(model, (side, side))
        assert isinstance(resized(torch.randn(2, 3, side, side)), object)
        with pytest.raises(ValueError, match=r"no whole number of patches .* give"):
            with_positions_of(model, (side + 1, side))
