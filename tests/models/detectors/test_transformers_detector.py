import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_detectors import detector as torchvision_detector
from small_detectors import facts
from transformers import (
    ConditionalDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    DFineConfig,
    HGNetV2Config,
    PreTrainedConfig,
    ResNetConfig,
    RTDetrConfig,
    RTDetrResNetConfig,
    RTDetrV2Config,
    YolosConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForObjectDetection

from diffkd import Distiller, FitNet
from diffkd.files.weights import save_student
from diffkd.models import DetectorTeacher, load_detector
from diffkd.teacher.view import DetectorView
from diffkd.training.models import build_distiller

STAGES = ["stage2", "stage3", "stage4"]
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
SIZES = {"min_size": (50,), "max_size": 96}


def rt_detr(kind: type[PreTrainedConfig], backbone: PreTrainedConfig) -> PreTrainedConfig:
    return kind(
        backbone_config=backbone,
        encoder_in_channels=[16, 16, 16],
        decoder_in_channels=[16, 16, 16],
        **dict.fromkeys(("encoder_hidden_dim", "encoder_ffn_dim", "d_model", "decoder_ffn_dim"), 16),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "decoder_layers"), 2),
        num_queries=12,
        num_denoising=4,
        hidden_expansion=1.0,
    )


def hgnet() -> PreTrainedConfig:
    return HGNetV2Config(
        embedding_size=8,
        stem_channels=[3, 8, 8],
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=STAGES,
    )


def detr(kind: type[PreTrainedConfig], width: int = 16, levels: int = 1) -> PreTrainedConfig:
    return kind(
        use_timm_backbone=False,
        backbone_config=ResNetConfig(**RESNET, out_features=STAGES[-levels:]),
        **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), width),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "decoder_layers"), 2),
        encoder_layers=1,
        num_queries=6,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "rt_detr": lambda: rt_detr(RTDetrConfig, RTDetrResNetConfig(**RESNET, out_features=STAGES)),
    "rt_detr_v2": lambda: rt_detr(RTDetrV2Config, RTDetrResNetConfig(**RESNET, out_features=STAGES)),
    "d_fine": lambda: rt_detr(DFineConfig, hgnet()),
    "detr": lambda: detr(DetrConfig),
    "conditional_detr": lambda: detr(ConditionalDetrConfig),
    "deformable_detr": lambda: detr(DeformableDetrConfig, width=32, levels=3),
    "yolos": lambda: YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 64],
        num_detection_tokens=6,
    ),
}
IMAGES = [torch.rand(3, 50, 70), torch.rand(3, 80, 60)]
SOME = {"boxes": torch.tensor([[7.0, 5.0, 35.0, 45.0]]), "labels": torch.tensor([3])}
NONE = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize("kind", CONFIGS)
def test_trains_and_detects(kind: str, tmp_path: Path) -> None:
    CONFIGS[kind]().save_pretrained(tmp_path)
    detector = load_detector(f"hf/{tmp_path}", num_classes=3, **SIZES)
    assert detector.training
    for targets in ([SOME, NONE], [NONE, NONE]):
        losses = detector(IMAGES, targets)
        assert list(losses) == ["loss"]
        losses["loss"].backward()
    found = detector.eval()(IMAGES)
    for one, (height, width) in zip(found, ((50, 70), (80, 60)), strict=True):
        assert len(one["boxes"]) == len(one["labels"]) == len(one["scores"]) > 0
        assert ((one["labels"] >= 1) & (one["labels"] <= 3)).all()
        assert (one["scores"].diff() <= 0).all()
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= torch.tensor([width, height, width, height])).all()


@pytest.fixture(params=["detr", "rt_detr"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    config = CONFIGS[request.param]()
    config.num_labels = 3
    AutoModelForObjectDetection.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def test_the_loss_and_its_targets_are_the_models_own(folder: Path) -> None:
    detector = load_detector(f"hf/{folder}", num_classes=3, pretrained=True, **SIZES).train()
    seen: list[dict[str, object]] = []
    outputs: list[torch.Tensor] = []
    detector.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    detector.model.register_forward_hook(lambda _, args, output: outputs.append(output.loss))
    losses = detector(IMAGES, [SOME, NONE])
    assert torch.equal(sum(losses.values()), outputs[0])
    label = seen[0]["labels"][0]
    assert label["class_labels"].tolist() == [2]
    assert torch.allclose(label["boxes"], torch.tensor([[21 / 70, 25 / 50, 28 / 70, 40 / 50]]), atol=1e-6)
    if detector.masked:
        mask = seen[0]["pixel_mask"]
        assert seen[0]["pixel_values"].shape == (2, 3, 96, 96)
        assert mask.sum((1, 2)).tolist() == [50 * 70, 66 * 50]
        assert mask[0, :50, :70].all()
        assert (seen[0]["pixel_values"][mask[:, None].expand(-1, 3, -1, -1) == 0] == 0).all()
    else:
        assert seen[0]["pixel_values"].shape == (2, 3, 64, 64)


def test_detections_are_in_pixels_of_the_images(folder: Path) -> None:
    detector = load_detector(f"hf/{folder}", num_classes=3, pretrained=True, **SIZES).eval()
    logits = torch.full((4, 4 if detector.masked else 3), -9.0)
    logits[2, 1], logits[0, 2] = 5.0, 3.0
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1] * 4, [0.25, 0.5, 0.5, 1.0], [0.1] * 4])
    (corners,), (scores,), (labels,) = detector.detections(logits[None], boxes[None], (80, 60))
    assert labels[:2].tolist() == [2, 3]
    assert torch.allclose(corners[:2], torch.tensor([[0.0, 0.0, 30.0, 80.0], [24.0, 24.0, 36.0, 56.0]]))
    assert scores[0] > 0.98


@pytest.mark.parametrize("folder", ["detr"], indirect=True)
def test_weights_are_loaded_and_replaced_layers_announced(folder: Path, tmp_path: Path) -> None:
    same = AutoModelForObjectDetection.from_pretrained(folder).state_dict()
    whole = load_detector(f"hf/{folder}", num_classes=3, pretrained=True)
    assert all(torch.equal(value, whole.model.state_dict()[key]) for key, value in same.items())
    with pytest.warns(UserWarning, match="start from random weights") as seen:
        other = load_detector(f"hf/{folder}", num_classes=5, pretrained=True, **SIZES)
    assert seen[0].filename == __file__
    assert other(IMAGES, [{**SOME, "labels": torch.tensor([5])}, NONE])["loss"].isfinite()
    file = save_student(other, tmp_path / "other.safetensors")
    again = load_detector(f"hf/{folder}", num_classes=5, weights=file)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in other.state_dict().items())


def test_features_for_a_teacher_are_the_backbones(folder: Path) -> None:
    detector = load_detector(f"hf/{folder}", num_classes=3, **SIZES).eval()
    batch, _ = detector.transform(IMAGES)
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    detector.model.model.backbone.register_forward_hook(lambda _, args, output: seen.append(output))
    detector(IMAGES)
    features = DetectorTeacher(detector, heads=False)(batch.tensors, batch.image_sizes)
    assert list(features) == [str(level) for level in range(len(seen[0]))]
    assert all(torch.equal(ours, theirs) for ours, (theirs, _) in zip(features.values(), seen[0], strict=True))
    with pytest.raises(ValueError, match="own queries"):
        DetectorTeacher(detector, heads=True)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    detector = load_detector(f"hf/{folder}", num_classes=3)
    with pytest.raises(ValueError, match="needs targets"):
        detector(IMAGES)
    with pytest.raises(ValueError, match="no readable configuration"):
        load_detector(f"hf/{tmp_path / 'nowhere'}", num_classes=3)
    with pytest.raises(ValueError, match="neither pretrained_backbone nor norm"):
        load_detector(f"hf/{folder}", num_classes=3, norm="frozen")
    with pytest.raises(ValueError, match="leave anchor_scale"):
        load_detector(f"hf/{folder}", num_classes=3, anchor_scale=1.0)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_detector(f"hf/{folder}", num_classes=3, pretrained=True)
    ResNetConfig(**RESNET).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="must be an object detector") as error:
        load_detector(f"hf/{tmp_path / 'classifier'}", num_classes=3)
    assert "\n" not in str(error.value)


def test_code_beside_the_model_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil: ...\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForObjectDetection": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hf/"):
        load_detector(f"hf/{folder}", num_classes=3)
    assert not (folder / "ran").exists()


def test_they_are_distilled_by_their_backbones_levels(tmp_path):
    CONFIGS["rt_detr"]().save_pretrained(tmp_path)
    student, teacher = (load_detector(f"hf/{tmp_path}", num_classes=3, min_size=(64,), max_size=96) for _ in range(2))
    images = [torch.rand(3, 60, 80), torch.rand(3, 70, 64)]
    distiller = Distiller(
        student, DetectorTeacher(teacher, heads=False), example=images, teacher_input=DetectorView(), method=FitNet
    )
    levels = [f"model.model.backbone[{level}]" for level in range(3)]
    assert list(distiller.names) == levels
    assert [pair.teacher for pair in distiller.pairs] == [f"backbone[{level}]" for level in range(3)]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}] * 2
    output, losses = distiller((images, targets))
    assert set(losses) == {f"{level}/kd" for level in levels}
    (sum(output.values()) + sum(losses.values())).backward()
    assert all(method.student_projection.weight.grad.abs().sum() > 0 for method in distiller.methods)


@pytest.mark.parametrize("kind", ["d_fine", "rt_detr"])
def test_a_diverged_detector_has_a_loss_of_nan(kind: str, tmp_path: Path) -> None:
    """Its matching refuses boxes that are not numbers, by an error that names neither loss nor step."""
    CONFIGS[kind]().save_pretrained(tmp_path)
    detector = load_detector(f"hf/{tmp_path}", num_classes=3, **SIZES)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.mul_(float("nan"))
    loss = detector(IMAGES, [SOME, NONE])["loss"]
    assert loss.isnan()
    assert loss.requires_grad


def test_what_is_constant_stays_so_with_published_weights(tmp_path: Path) -> None:
    config = CONFIGS["d_fine"]()
    config.num_labels = 3
    AutoModelForObjectDetection.from_config(config).save_pretrained(tmp_path)
    detector = load_detector(f"hf/{tmp_path}", num_classes=3, pretrained=True, **SIZES)
    frozen = {name for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    assert {"model.model.decoder.reg_scale", "model.model.decoder.up"} <= frozen
    assert len(frozen) < len(list(detector.parameters())) / 2


@pytest.mark.parametrize(
    ("kind", "reason"), [("yolos", r"no module model\.backbone"), ("detr", "is frozen by transformers")]
)
def test_students_whose_backbone_cannot_learn_are_refused(kind: str, reason: str, tmp_path: Path) -> None:
    CONFIGS[kind]().save_pretrained(tmp_path)
    student = load_detector(f"hf/{tmp_path}", num_classes=2, **SIZES)
    with pytest.raises(ValueError, match=reason):
        build_distiller(student, torchvision_detector(), None, data=facts(), pairs="auto", method=None, seed=0)
