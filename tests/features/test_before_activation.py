"""The tap before an activation: `layer@pre`."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from diffkd import Distiller, FitNet, Pair, list_layers
from diffkd.features.activations import Activation
from diffkd.features.layers import activations_of, find_layer
from diffkd.features.recorder import Recorder
from diffkd.models import load_model
from diffkd.teacher.options import TeacherOptions

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block whose activations are functions, in place or not."""

    def __init__(self, channels: int, in_place: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=self.in_place)))
        branch += x
        return F.relu(branch, inplace=self.in_place)


class Net(nn.Module):
    def __init__(self, channels: int = 4, in_place: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.stage = nn.Sequential(Block(channels, in_place), Block(channels, in_place))
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage(self.stem(x)).mean(dim=(2, 3)))


def recorded(model, *names):
    layers = list_layers(model, IMAGES)
    for name in names:
        find_layer(layers, name, "student")
    recorder = Recorder(names, activations=activations_of(layers))
    recorder.attach(model)
    try:
        return recorder.record(model, IMAGES).features
    finally:
        recorder.detach()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_called_function(in_place):
    model = Net(in_place=in_place).eval()
    found = recorded(model, "stage@pre", "stage.0@pre", "stage")
    assert found["stage@pre"].min() < 0
    assert torch.equal(found["stage@pre"].relu(), found["stage"])
    first = model.stage[0]
    x = model.stem(IMAGES)
    branch = first.bn2(first.conv2(first.bn1(first.conv1(x)).relu()))
    assert torch.equal(found["stage.0@pre"], branch + x)
    assert activations_of(list_layers(model, IMAGES))["stage"] == Activation("stage.1", 1, True, "stage.1.bn2")


@pytest.mark.parametrize(
    ("build", "layer", "norm"),
    [
        (lambda: load_model("cifar/resnet20"), "layer3", "layer3.2.bn2"),
        (lambda: load_model("cifar/resnet8x4"), "layer2", "layer2.0.bn2"),  # not the BatchNorm of the shortcut
        (lambda: load_model("cifar/resnet50"), "layer4", "layer4.2.bn3"),
        (lambda: load_model("cifar/shufflenetv1"), "layer2", "layer2.7.bn3"),
        (lambda: torchvision.models.resnet18(weights=None), "layer4", "layer4.1.bn2"),
        (lambda: torchvision.models.resnet50(weights=None), "layer1", "layer1.2.bn3"),
        (lambda: timm.create_model("resnet18", zero_init_last=False), "layer3", "layer3.1.bn2"),
        (lambda: timm.create_model("test_resnet", zero_init_last=False), "layer4", "layer4.0.bn2"),
    ],
)
def test_residual_networks_activate_the_sum(build, layer, norm):
    model = build().eval()
    found = recorded(model, f"{layer}@pre", layer)
    assert found[f"{layer}@pre"].min() < 0
    torch.testing.assert_close(found[f"{layer}@pre"].relu(), found[layer])
    assert activations_of(list_layers(model, IMAGES))[layer].norm == norm


def test_wide_resnets_activate_after_the_next_normalisation():
    model = load_model("cifar/wrn_16_1").eval()
    found = recorded(model, "layer1@pre", "layer3@pre", "layer1", "layer3")
    assert torch.equal(found["layer1@pre"], model.layer2[0].norm1(found["layer1"]))
    assert torch.equal(found["layer3@pre"], model.norm(found["layer3"]))
    norms = {name: one.norm for name, one in activations_of(list_layers(model, IMAGES)).items()}
    assert (norms["layer1"], norms["layer3"]) == ("layer2.0.norm1", "norm")


@pytest.mark.parametrize("build", [lambda: load_model("cifar/shufflenetv2"), torchvision.models.shufflenet_v2_x0_5])
def test_shufflenetv2_shuffles_after_its_activation(build):
    """As the lists of features of the CRD benchmark have it: half of the channels before the ReLU, then the shuffle."""
    torch.manual_seed(0)
    model = build().eval()
    (layer, stage) = next((name, one) for name, one in model.named_children() if name in ("layer2", "stage3"))
    found = recorded(model, f"{layer}@pre", layer)
    unit = stage[-1]
    x = IMAGES
    for name, module in model.named_children():
        if name == layer:
            break
        x = module(x)
    kept, convolved = stage[:-1](x).chunk(2, dim=1)
    branch = unit.branch if hasattr(unit, "branch") else unit.branch2
    joined = torch.cat([kept, branch[:-1](convolved)], dim=1)
    batch, channels, *size = joined.shape
    expected = joined.reshape(batch, 2, channels // 2, *size).transpose(1, 2).reshape(joined.shape)
    assert expected.min() < 0
    torch.testing.assert_close(found[f"{layer}@pre"], expected)
    assert found[f"{layer}@pre"].relu().equal(found[layer])


def test_moved_values_in_a_distiller_compiled_and_copied():
    torch.manual_seed(0)
    models = load_model("cifar/shufflenetv2", num_classes=5), load_model("cifar/resnet8", num_classes=5)
    pair = Pair("layer3@pre", "layer3@pre")
    images = torch.randn(2, 3, 32, 32)
    distiller = Distiller(*models, [pair], example=images, method=FitNet)
    distiller.student.eval()
    losses = copy.deepcopy(distiller)(images)[1]
    try:
        compiled = torch.compile(copy.deepcopy(distiller), backend="eager", fullgraph=True)(images)[1]
    finally:
        torch.compiler.reset()
    torch.testing.assert_close(compiled, losses)


def test_a_layer_without_activation_has_no_such_tap():
    layers = list_layers(load_model("cifar/mobilenetv2").eval(), IMAGES)
    with pytest.raises(ValueError, match=r"'layer7' of student Net has no activation.*take 'layer7'"):
        find_layer(layers, "layer7@pre", "student Net")


def pairs():
    return [Pair("stage@pre", "stage@pre"), Pair("stage.0@pre", "stage@pre", name="first")]


@pytest.mark.parametrize("in_place", [False, True])
def test_in_a_distiller_compiled_and_copied(in_place):
    torch.manual_seed(0)
    distiller = Distiller(Net(4, in_place), Net(6, in_place), pairs(), example=IMAGES, method=FitNet)
    output, losses = distiller(IMAGES)
    (output.sum() + sum(losses.values())).backward()
    assert distiller.student.stem.weight.grad.abs().sum() > 0
    copied = copy.deepcopy(distiller)
    again = copied(IMAGES)[1]
    try:
        compiled = torch.compile(copy.deepcopy(distiller), backend="eager", fullgraph=True)(IMAGES)[1]
    finally:
        torch.compiler.reset()
    for name, loss in losses.items():
        torch.testing.assert_close(again[name], loss)
        torch.testing.assert_close(compiled[name], loss)


def test_with_a_reused_module_compiled_and_folded():
    torch.manual_seed(0)
    names = [Pair("layer4@pre"), Pair("layer2@pre")]
    models = torchvision.models.resnet18(num_classes=4), torchvision.models.resnet18(num_classes=4)
    images = torch.randn(2, 3, 32, 32)
    distiller = Distiller(*models, names, example=images, method=FitNet).eval()
    folded = Distiller(
        copy.deepcopy(models[0]), models[1], names, example=images, method=FitNet, teacher_options=TeacherOptions(True)
    ).eval()
    folded.methods.load_state_dict(distiller.methods.state_dict())
    expected, found = distiller.observe(images), folded.observe(images)
    for name in expected:
        assert expected[name].teacher.min() < 0
        # Folding rounds each of 20 layers anew, each by less than 1e-6 of its values.
        torch.testing.assert_close(found[name].teacher, expected[name].teacher, rtol=1e-4, atol=1e-4)
    try:
        compiled = torch.compile(copy.deepcopy(distiller), backend="eager", fullgraph=True)(images)[1]
    finally:
        torch.compiler.reset()
    for name, loss in distiller(images)[1].items():
        torch.testing.assert_close(compiled[name], loss)
