"""Layers and resizing as the papers have them: RepDistiller's and ReviewKD's lists of features for their networks."""

import warnings
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

from diffkd import DiffKD, Distiller, FitNet, list_layers, match_layers
from diffkd.distill.stages import last_feature, stages
from diffkd.methods import AT, OFD, SP, VID, ReviewKD
from diffkd.models import load_model

# f1, f2, ... of `is_feat` in RepDistiller's models, all but stem and pooled vector: (channels, side of the map).
CIFAR = {
    "resnet20": [(16, 32), (32, 16), (64, 8)],
    "resnet56": [(16, 32), (32, 16), (64, 8)],
    "resnet110": [(16, 32), (32, 16), (64, 8)],
    "resnet8x4": [(64, 32), (128, 16), (256, 8)],
    "resnet32x4": [(64, 32), (128, 16), (256, 8)],
    "resnet50": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
    "wrn_40_1": [(16, 32), (32, 16), (64, 8)],
    "wrn_40_2": [(32, 32), (64, 16), (128, 8)],
    "mobilenetv2": [(12, 16), (16, 8), (48, 4), (160, 2)],
    "shufflenetv1": [(240, 16), (480, 8), (960, 4)],
    "shufflenetv2": [(116, 16), (232, 8), (464, 4)],
}
# The widths at a quarter to a thirty-second of the image; ReviewKD and mdistiller take layer1 to layer4 of a ResNet,
# and of MobileNetV1 the maps of 128, 256, 512 and 1024 channels.
IMAGENET = {
    "torchvision/resnet18": [64, 128, 256, 512],
    "torchvision/resnet50": [256, 512, 1024, 2048],
    "torchvision/densenet121": [256, 512, 1024, 1024],
    "torchvision/mobilenet_v2": [24, 32, 96, 320],
    "torchvision/efficientnet_b0": [24, 40, 112, 320],
    "torchvision/convnext_tiny": [96, 192, 384, 768],
    "timm/resnet18": [64, 128, 256, 512],
    "timm/mobilenetv1_100": [128, 256, 512, 1024],
    "timm/mobilenetv2_100": [24, 32, 96, 320],
    "timm/efficientnet_b0": [24, 40, 112, 320],
    "timm/convnext_tiny": [96, 192, 384, 768],
    "timm/regnety_004": [48, 104, 208, 440],
}


def shapes(layers):
    return [(layer.feature_shape.channels, *layer.feature_shape.size) for layer in layers]


@pytest.mark.parametrize("name", CIFAR)
def test_the_stages_of_the_cifar_networks(name):
    layers = list_layers(load_model(f"cifar/{name}").eval(), torch.randn(1, 3, 32, 32))
    assert shapes(stages(layers)) == [(channels, side, side) for channels, side in CIFAR[name]]


@pytest.mark.parametrize("name", IMAGENET)
def test_the_last_four_stages_of_networks_for_imagenet(name):
    library, _, model = name.partition("/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torchvision.models.get_model(model) if library == "torchvision" else timm.create_model(model)
    layers = list_layers(net.eval(), torch.randn(1, 3, 64, 64))
    sides = (16, 8, 4, 2)
    assert shapes(stages(layers)[-4:]) == [(c, side, side) for c, side in zip(IMAGENET[name], sides, strict=True)]


def test_a_resnet_has_no_stem_among_its_stages():
    layers = list_layers(torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64))
    assert [layer.name for layer in stages(layers)] == ["layer1", "layer2", "layer3", "layer4"]
    assert last_feature(layers).name == "layer4"


def pair(student, teacher, method):
    images = torch.randn(2, 3, 32, 32)
    models = [load_model(f"cifar/{name}").eval() for name in (student, teacher)]
    return [(one.student, one.teacher) for one in match_layers(*models, images, method=method)]


def test_what_the_papers_compare():
    assert pair("mobilenetv2", "resnet50", SP) == [("layer7", "layer4")]
    assert pair("shufflenetv2", "resnet32x4", SP) == [("layer3", "layer3")]
    assert pair("wrn_16_1", "wrn_16_2", SP) == [("layer3", "layer3")]
    assert pair("shufflenetv1", "resnet8x4", AT) == [(f"layer{n}", f"layer{n}") for n in (1, 2, 3)]
    assert pair("mobilenetv2", "resnet50", VID) == [
        ("layer2", "layer1"), ("layer3", "layer2"), ("layer5", "layer3"), ("layer7", "layer4")
    ]  # fmt: skip


def test_before_the_activation():
    before = [f"layer{n}@pre" for n in (1, 2, 3)]
    assert pair("resnet20", "resnet56", OFD) == [(before, before)]
    assert pair("wrn_16_1", "wrn_16_2", OFD) == [(before, before)]
    assert pair("shufflenetv2", "resnet8x4", OFD) == [(before, before)]
    linear = ["layer2", "layer3", "layer5", "layer7"]  # no ReLU after the projection
    assert pair("mobilenetv2", "resnet50", OFD) == [(linear, [*before, "layer4@pre"])]
    after = ["layer1", "layer2", "layer3"]
    assert pair("resnet20", "resnet56", ReviewKD) == [([*after, "layer3"], [*before, "layer3"])]
    assert pair("wrn_16_1", "wrn_16_2", ReviewKD) == [([*after, "relu"], [*before, "relu"])]
    assert pair("shufflenetv2", "resnet8x4", ReviewKD) == [([*after, "head"], [*before, "layer3"])]


def nested(channels, strides):
    """A net whose stages hold two convolutions each."""
    widths = [3, *channels]
    stages_ = [
        nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 1), nn.ReLU())
        for a, b, s in zip(widths, channels, strides, strict=False)
    ]
    return nn.Sequential(*stages_, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 5)).double()


@pytest.mark.parametrize("strides", [((1, 2), (2, 2)), ((2, 2), (1, 2))])
def test_the_larger_map_is_averaged_for_at_and_vid_and_none_is_resized_for_sp(strides):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    student, teacher = nested((4, 6), strides[0]), nested((5, 7), strides[1])
    ours, theirs = student[:2](images), teacher.eval()[:2](images)
    large = ours if ours.shape[2] > theirs.shape[2] else theirs
    pooled = large.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    ours_at, theirs_at = (pooled, theirs) if large is ours else (ours, pooled)

    def attention(x):
        x = (x**2).mean(dim=1).flatten(1)
        return x / (x**2).sum(dim=1, keepdim=True).sqrt()

    def similarity(x):
        g = x.flatten(1) @ x.flatten(1).T
        return g / (g**2).sum(dim=1, keepdim=True).sqrt()

    found = Distiller(student, teacher, example=images, method=AT)(images)[1]["1/kd"]
    expected = 1000 * ((attention(ours_at) - attention(theirs_at)) ** 2).mean()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    found = Distiller(student, teacher, example=images, method=SP)(images)[1]["1/kd"]
    expected = 3000 * ((similarity(ours) - similarity(theirs)) ** 2).mean()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)

    distiller = Distiller(student, teacher, example=images, method=VID).double()
    method = distiller.methods[-1]
    mean = ours_at
    for layer in (0, 2, 4):
        weight = method.regression[layer].weight[:, :, 0, 0]
        assert method.regression[layer].bias is None
        mean = torch.einsum("oc,bchw->bohw", weight, mean if layer == 0 else mean.relu())
    variance = ((1 + method.alpha.exp()).log() + method.eps)[:, None, None]
    expected = 0.5 * ((theirs_at - mean) ** 2 / variance + variance.log()).mean()
    torch.testing.assert_close(distiller(images)[1]["1/kd"], expected, rtol=1e-10, atol=0)


def test_ofd_takes_its_margins_from_the_teachers_batchnorms():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    student, teacher = load_model("cifar/resnet8"), load_model("cifar/resnet14")
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    distiller = Distiller(student, teacher, example=images, method=OFD)
    method = distiller.methods[0]
    for n, margin in enumerate(method.margins, 1):
        norm = teacher.get_submodule(f"layer{n}.1.bn2")
        below = torch.special.ndtr(-norm.bias.double())
        expected = norm.bias.double() - torch.exp(-(norm.bias.double() ** 2) / 2) / (2 * torch.pi) ** 0.5 / below
        values = margin.negative[0] / margin.negative[1]
        rare = below <= 0.001
        torch.testing.assert_close(values.double()[~rare], expected[~rare], rtol=1e-5, atol=1e-6)
        assert not margin.estimates


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("vgg11_bn", 64, [64, 128, 256, 512, 512, 512]),
        ("alexnet", 224, [64, 192, 256, 256]),
    ],
)
def test_networks_without_blocks_have_a_stage_for_each_resolution(name, size, expected):
    layers = list_layers(getattr(torchvision.models, name)(num_classes=10), torch.zeros(2, 3, size, size))
    found = stages(layers)
    assert [one.feature_shape.channels for one in found] == expected
    assert found[-1].name == "features"


@pytest.mark.parametrize(
    ("name", "feature", "last_stages"),
    [
        ("resnet18", "layer4", ["layer2", "layer3", "layer4"]),
        ("mobilenet_v2", "features.18", ["features.6", "features.13", "features.17"]),
        ("shufflenet_v2_x1_0", "conv5", ["stage2", "stage3", "stage4"]),
    ],
)
def test_the_last_stage_of_one_position_is_one(name, feature, last_stages):
    layers = list_layers(getattr(torchvision.models, name)(num_classes=10), torch.zeros(2, 3, 32, 32))
    last = last_feature(layers)
    assert (last.name, last.feature_shape.size) == (feature, (1, 1))
    assert [one.name for one in stages(layers)][-3:] == last_stages


def test_what_a_head_makes_of_a_small_map_is_no_stage():
    # Its head averages by a function, and has convolutions of its own.
    layers = list_layers(timm.create_model("vgg11", num_classes=10), torch.zeros(2, 3, 64, 64))
    assert last_feature(layers).name == stages(layers)[-1].name == "features"
    layers = list_layers(timm.create_model("mobilenetv3_small_050", num_classes=10), torch.zeros(2, 3, 64, 64))
    assert last_feature(layers).name == "blocks"


@pytest.mark.parametrize(
    ("name", "wide", "narrow"),
    [
        ("tf_efficientnet_lite0", "bn2", "blocks.6"),  # 1,280 and 320 channels
        ("mobilenetv2_100", "bn2", "blocks.6"),
        ("resnet18", "layer4", "layer4"),
        ("test_vit", "norm", "norm"),
    ],
)
def test_a_teachers_last_stage_comes_before_the_convolution_of_its_head(name, wide, narrow):
    size = 160 if name == "test_vit" else 64
    teacher = timm.create_model(name, num_classes=10)
    student, images = timm.create_model("mobilenetv3_small_050", num_classes=10), torch.zeros(2, 3, size, size)
    for method, layer in ((FitNet, wide), (partial(FitNet, last_stage=True), narrow)):
        (pair,) = match_layers(student, teacher, images, method=method)
        assert (pair.student_names, pair.teacher_names) == (("blocks",), (layer,))
    pairs = match_layers(student, teacher, images, method=partial(DiffKD, last_stage=True))
    assert [pair.teacher_names for pair in pairs] == [(narrow,), ("output",)]
