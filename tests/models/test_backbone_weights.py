"""Files of classifiers in the backbones of detectors and segmenters."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from short_trainings import built
from torchvision import models as torchvision_models

from diffkd.data import DetectionScenes, FashionSubset, SegmentationScenes
from diffkd.models import load_detector, load_segmenter
from diffkd.models.weights import fill_backbone

CLASSES = ("Trouser", "Bag")


def detector(backbone):
    return load_detector(f"fcos/{backbone}", num_classes=2, min_size=(64,), max_size=64, fpn_channels=64)


def classifier(name):
    torch.manual_seed(7)
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"), num_classes=5)
    return torchvision_models.get_model(name, weights=None, num_classes=5)


@pytest.mark.parametrize(
    ("backbone", "wrapped"),
    [
        ("timm/test_resnet", "{}"),
        ("timm/test_convnext", "model.{}"),  # its stages are flattened: stages_0
        ("timm/test_efficientnet", "state_dict.module.{}"),
        ("resnet18", "{}"),
        ("mobilenet_v3_small", "net.{}"),
    ],
)
def test_a_detectors_backbone_computes_what_the_classifiers_does(backbone, wrapped, tmp_path):
    whole, model = classifier(backbone).eval(), detector(backbone)
    save_file({wrapped.format(name): value for name, value in whole.state_dict().items()}, tmp_path / "w.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("backbone.body")}
    report = fill_backbone(model, f"fcos/{backbone}", tmp_path / "w.safetensors")
    assert report.taken == len(model.backbone.body.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = model.eval().backbone.body(images)
        if backbone.startswith("timm/"):
            reference = whole.forward_intermediates(images, intermediates_only=True, norm=False)
            pairs = zip(maps[-2:], reference[-2:], strict=True)
        else:
            through = torch.nn.Sequential(*list(whole.children())[:-2]) if "resnet" in backbone else whole.features
            pairs = [(list(maps.values())[-1], through(images))]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("smp/unet/resnet18", "resnet18"),
        ("smp/fpn/timm/test_resnet", "timm/test_resnet"),
        ("torchvision/lraspp_mobilenet_v3_large", "mobilenet_v3_large"),
    ],
)
def test_a_segmenters_encoder_computes_what_the_classifiers_does(name, backbone, tmp_path):
    whole, model = classifier(backbone).eval(), load_segmenter(name, num_classes=3)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    fill_backbone(model, name, tmp_path / "w.pth")
    # Built with dilation, the same weights give another map: a part that has none of it is compared.
    stem = {"resnet18": "layer1.0.conv1.weight", "timm/test_resnet": "layer1.0.conv1.weight"}.get(backbone)
    ours = {key: value for key, value in model.state_dict().items() if "encoder" in key or "backbone" in key}
    reference = {key.removeprefix("features."): value for key, value in whole.state_dict().items()}
    matched = 0
    for key, value in ours.items():
        short = next((key[at:] for at in range(len(key)) if key[at:] in reference), None)
        if short is not None:
            matched += 1
            assert torch.equal(value, reference[short])
    assert matched == len(ours)
    assert stem is None or any(key.endswith(stem) for key in ours)


@pytest.mark.parametrize("name", ["fcos/resnet18", "smp/unet/resnet18", "fcos/timm/resnet18"])
def test_a_deeper_network_is_refused(name, tmp_path):
    torch.save(torchvision_models.resnet34(num_classes=5).state_dict(), tmp_path / "w.pth")
    model = detector(name.removeprefix("fcos/")) if "fcos" in name else load_segmenter(name, num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit.*unexpected layer1\.2\.conv1\.weight.*and 77 more"):
        fill_backbone(model, name, tmp_path / "w.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_deeper_network_is_refused_where_stages_are_flattened(tmp_path):
    state = classifier("timm/test_convnext").state_dict()
    deeper = {name.replace("stages.2.blocks.0.", "stages.2.blocks.9."): value for name, value in state.items()}
    torch.save(state | deeper, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"unexpected stages_2\.blocks\.9\."):
        fill_backbone(detector("timm/test_convnext"), "fcos/timm/test_convnext", tmp_path / "w.pth")


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_an_encoder_without_the_last_layers_of_its_network_is_filled(backbone, tmp_path):
    whole, model = classifier(f"timm/{backbone}"), load_segmenter(f"smp/pspnet/timm/{backbone}", num_classes=3)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    report = fill_backbone(model, f"smp/pspnet/timm/{backbone}", tmp_path / "w.pth")
    assert report.taken == len(model.encoder.model.state_dict()) < len(whole.state_dict())


@pytest.mark.parametrize("name", ["fcos/resnet18", "smp/unet/resnet18"])
def test_projection_heads_are_left_out(name, tmp_path):
    state = torchvision_models.resnet18().state_dict()
    state |= {"projection_head.0.weight": torch.ones(4, 512), "prototypes.weight": torch.ones(3, 4)}
    torch.save(state, tmp_path / "w.pth")
    model = detector("resnet18") if "fcos" in name else load_segmenter(name, num_classes=3)
    report = str(fill_backbone(model, name, tmp_path / "w.pth"))
    assert "projection_head.0.weight" in report
    assert "prototypes.weight" in report


def test_a_run_of_classification_fills_the_backbone_of_a_detector_that_keeps_its_statistics(tmp_path):
    from diffkd.training.fit import fit

    run = tmp_path / "run"
    fit("timm/test_resnet", FashionSubset(batch_size=64), run, max_steps=2, epochs=1, progress=False)
    scenes = DetectionScenes(train_count=4, val_count=2, size=(64, 64), classes=CLASSES, batch_size=2)
    with pytest.raises(ValueError, match=r"conv1.0.weight is \(.*, 1, .*\) there"):
        built("fcos/timm/test_resnet", scenes, backbone_weights=str(run))  # grey images there, colours here


def test_the_start_report_says_what_was_taken_and_norms_are_frozen(tmp_path):
    whole = classifier("timm/test_resnet")
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    scenes = DetectionScenes(train_count=4, val_count=2, size=(64, 64), classes=CLASSES, batch_size=2)
    training = built("fcos/timm/test_resnet", scenes, backbone_weights=str(tmp_path / "w.pth"))
    assert any("student's backbone" in note and "fc" in note for note in training.notes)
    kinds = {type(module).__name__ for module in training.student.backbone.body.modules()}
    assert not any(kind.startswith("BatchNorm") for kind in kinds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone_weights": "none.pth"}, "none.pth"),
        ({"backbone_weights": "w.pth", "pretrained_backbone": True}, "leave one of them out"),
        ({"backbone_weights": "w.pth", "student_weights": "v.pth"}, "leave one of them out"),
        ({"backbone_weights": "other.pth"}, "does not fit the backbone"),
    ],
)
def test_files_that_do_not_fit_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(classifier("timm/test_resnet").state_dict(), "w.pth")
    torch.save(classifier("timm/test_vit").state_dict(), "other.pth")
    scenes = SegmentationScenes(train_count=4, val_count=2, size=(64, 64), classes=CLASSES, batch_size=2)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        built("smp/pspnet/timm/test_resnet", scenes, **options)


def test_a_classifier_is_referred_to_student_weights():
    with pytest.raises(ValueError, match="student_weights"):
        built("timm/test_resnet", FashionSubset(), backbone_weights="w.pth")
