"""Files of weights of the libraries, of today and of older versions."""

import re

import pytest
import timm
import torch
from torch import nn
from torchvision import models as torchvision_models
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
)

from diffkd.export.student_file import find_weights
from diffkd.models import load_detector, load_model, load_segmenter
from diffkd.models.weights import fill


def filled(model, state, folder, **options):
    torch.save(state, folder / "weights.pt")
    return fill(model, folder / "weights.pt", **options)


def same(model, reference):
    own = model.state_dict()
    return all(torch.equal(value, own[name]) for name, value in reference.state_dict().items())


def tiny_vit(size):
    return timm.create_model("vit_tiny_patch16_224", img_size=size, embed_dim=24, depth=2, num_heads=2, num_classes=3)


def test_positions_of_another_size_are_resampled_as_timm_does(tmp_path):
    model = tiny_vit(64)
    report = filled(model, tiny_vit(96).state_dict(), tmp_path)
    assert "converted by its library" in str(report)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_buffers_that_older_files_hold_are_left_out(tmp_path):
    made = [
        timm.create_model(
            "swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), num_classes=3
        )
        for _ in range(2)
    ]
    older = made[0].state_dict() | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49).long()}
    filled(made[1], older, tmp_path)
    assert same(made[1], made[0])


@pytest.mark.parametrize(
    ("build", "older"),
    [
        (
            lambda: torchvision_models.DenseNet(4, (2, 2), 8, num_classes=3),
            lambda name: re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12]\.)", r"\1.\2", name),
        ),
        (
            lambda: torchvision_models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3),
            lambda name: name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."),
        ),
        (lambda: torchvision_models.mnasnet0_5(num_classes=3), lambda name: name),
        (
            lambda: load_detector("fasterrcnn/timm/test_resnet", num_classes=2, min_size=(64,), fpn_channels=32),
            lambda name: re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", name).replace(
                "rpn.head.conv.0.0.", "rpn.head.conv."
            ),
        ),
    ],
)
def test_older_names_of_torchvision(tmp_path, build, older):
    first, second = build(), build()
    filled(second, {older(name): value for name, value in first.state_dict().items()}, tmp_path)
    assert same(second, first)


@pytest.mark.parametrize("prefix", ["", "state_dict.model."])
def test_older_names_of_smp(tmp_path, prefix):
    """DeepLabV3's decoder was a Sequential; smp renames its entries itself when they are loaded."""
    first, second = (load_segmenter("smp/deeplabv3/resnet18", num_classes=3) for _ in range(2))
    older = {"decoder.aspp.": "decoder.0.", "decoder.conv.": "decoder.1.", "decoder.bn.": "decoder.2."}
    state = {}
    for name, value in first.state_dict().items():
        renamed = next((name.replace(*pair, 1) for pair in older.items() if name.startswith(pair[0])), name)
        state[prefix.partition(".")[2] + renamed] = value
    assert any(".0.convs" in name for name in state)
    filled(second, {"state_dict": state} if prefix else state, tmp_path)
    assert same(second, first)


def test_auxiliary_heads_that_are_not_wanted_are_left_out(tmp_path):
    build = torchvision_models.segmentation.fcn_resnet50
    options = {"weights": None, "weights_backbone": None, "num_classes": 3}
    saved = build(aux_loss=True, **options).state_dict()
    report = filled(build(aux_loss=False, **options), saved, tmp_path)
    assert "left out: aux_classifier.* (8 tensors)" in str(report)


def vit_config():
    return ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        num_labels=3,
    )


def test_folders_and_files_of_transformers(tmp_path):
    saved = ViTForImageClassification(vit_config())
    saved.save_pretrained(tmp_path)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        model = load_model(f"hf/{tmp_path}", weights=find_weights(weights))
        assert same(model, saved)


def test_the_body_alone_needs_a_new_head(tmp_path):
    saved = ViTForImageClassification(vit_config())
    saved.save_pretrained(tmp_path)
    torch.save(saved.vit.state_dict(), tmp_path / "body.pt")
    with pytest.raises(ValueError, match=r"missing classifier\.weight"):
        load_model(f"hf/{tmp_path}", weights=tmp_path / "body.pt", num_classes=3)
    with pytest.warns(UserWarning, match=r"classifier\.weight, classifier\.bias of ViTForImage.* random weights"):
        model = load_model(f"hf/{tmp_path}", weights=tmp_path / "body.pt", num_classes=3, new_head=True)
    assert same(model.vit, saved.vit)


def test_detectors_of_transformers(tmp_path):
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        ),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_labels=3,
    )
    saved = DetrForObjectDetection(config)
    saved.save_pretrained(tmp_path)
    detector = load_detector(f"hf/{tmp_path}", num_classes=3, weights=tmp_path / "model.safetensors")
    assert same(detector.model, saved)


@pytest.mark.parametrize("change", ["other classes", "none"])
def test_a_new_head_is_drawn_for_other_classes(tmp_path, change):
    saved = load_model("cifar/compact_resnet8", num_classes=7)
    state = saved.state_dict()
    if change == "none":
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "weights.pt")
    options = {"num_classes": 2, "weights": tmp_path / "weights.pt"}
    with pytest.raises(ValueError, match=r"fc\.weight"):
        load_model("cifar/compact_resnet8", **options)
    with pytest.warns(UserWarning, match=r"fc\.weight, fc\.bias of .* start from random weights") as seen:
        model = load_model("cifar/compact_resnet8", new_head=True, **options)
    assert seen[0].filename == __file__
    assert torch.equal(model.conv1.weight, saved.conv1.weight)


def test_segmenters_may_lack_the_auxiliary_head(tmp_path):
    name, options = "torchvision/fcn_resnet50", {"num_classes": 3}
    torch.save(load_segmenter(name, **options).state_dict(), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match=r"aux_classifier\.0\.weight.* start from random weights"):
        load_segmenter(name, weights=tmp_path / "weights.pt", auxiliary=True, new_head=True, **options)


def test_nothing_is_known_of_models_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match="missing weight"):
        filled(nn.Linear(2, 2), {"kernel": torch.ones(2, 2)}, tmp_path)


def test_checkpoints_of_several_processes_say_how_they_are_joined(tmp_path):
    (tmp_path / ".metadata").touch()
    with pytest.raises(FileNotFoundError, match="format_utils dcp_to_torch"):
        find_weights(tmp_path)
