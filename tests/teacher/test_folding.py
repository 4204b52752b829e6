"""BatchNorm goes into what comes before it, and only where nobody can tell but by the clock."""

import copy
import warnings

import hypothesis.strategies as st
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from small_nets import ConvNet, Pyramid, Twice, TwoInputs
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.ops.misc import FrozenBatchNorm2d

from diffkd.models import load_model
from diffkd.teacher.folding import fold_batchnorm

IMAGES = torch.randn(2, 3, 32, 32)


def lived_in(model):
    """Give every BatchNorm statistics, scale and shift that are not those of a fresh one."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 2)
            if module.weight is not None:
                module.weight.data.uniform_(-1.5, 1.5)
                module.bias.data.normal_()
    return model.eval()


def norms(model):
    return [name for name, module in model.named_modules() if hasattr(module, "running_var")]


def check(model, example=IMAGES, **options):
    """Fold, and return the pairs; outputs and names are the same whatever was folded, and `model` is as before."""
    model = lived_in(model).double()
    before = copy.deepcopy(model.state_dict())
    wide = example.double() if isinstance(example, torch.Tensor) else example
    folded, pairs = fold_batchnorm(model, wide, **options)
    with torch.no_grad():
        torch.testing.assert_close(folded(wide), model(wide), rtol=1e-10, atol=1e-11)
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in model.named_modules()]
    assert len(norms(folded)) == len(norms(model)) - len(pairs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return pairs


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("cifar/resnet20", 0),
        ("cifar/wrn_40_2", 18),  # normalised before the convolution: its input is a sum
        ("cifar/shufflenetv2", 0),
        ("torchvision/mobilenet_v2", 0),
        ("torchvision/regnet_y_400mf", 0),
        ("timm/mobilenetv3_small_050", 0),  # its BatchNorms hold the activations
        ("timm/repvgg_a0", 17),  # of the shortcuts
    ],
)
def test_networks(name, left):
    model = load_model(name, num_classes=5)
    assert len(check(model)) == len(norms(model)) - left


def test_frozen_norms_of_detectors():
    model = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    assert len(check(model)) == 20


@settings(max_examples=25)
@given(
    kind=st.sampled_from(["conv1", "conv2", "conv3", "transposed", "linear"]),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "reflect", "circular"]),
)
def test_layers(kind, groups, bias, affine, padding_mode):
    if kind == "linear":
        model, example = nn.Sequential(nn.Linear(6, 4, bias=bias), nn.BatchNorm1d(4, affine=affine)), torch.randn(3, 6)
    elif kind == "transposed":
        layer = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=groups, bias=bias)
        model, example = nn.Sequential(layer, nn.BatchNorm2d(4, affine=affine)), torch.randn(3, 6, 5, 4)
    else:
        rank = int(kind[-1])
        conv, norm = (getattr(nn, f"{one}{rank}d") for one in ("Conv", "BatchNorm"))
        layer = conv(6, 4, 3, padding=1, groups=groups, bias=bias, padding_mode=padding_mode)
        model, example = nn.Sequential(layer, norm(4, affine=affine)), torch.randn(3, 6, *(5, 4, 3)[:rank])
    assert check(model, example) == ([] if kind == "transposed" and groups == 2 else [("0", "1")])


class Net(nn.Module):
    """A convolution, a BatchNorm, and a forward to be chosen."""

    def __init__(self, forward, **more):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.how = forward
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.how(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: (lambda y: net.bn(y) + y)(net.conv(x)),
        lambda net, x: (lambda y: net.bn(y) + y[:, :1])(net.conv(x)),
        lambda net, x: (lambda y: (net.bn(y), y)[::-1])(net.conv(x)),
        lambda net, x: (lambda y: net.bn(y) * (y.argmax() > 5))(net.conv(x)),
        lambda net, x: net.bn(net.conv(x) * 2),
        lambda net, x: net.bn(net.conv(x).relu_()),
        lambda net, x: net.bn(net.conv(net.conv(x))),
        lambda net, x: net.bn(net.bn(net.conv(x))),
        lambda net, x: net.bn(net.conv(x)) + net.bn(x),
        lambda net, x: net.bn(net.conv(x)) + net.conv.weight.sum(),
        lambda net, x: net.bn(net.conv(x)) + net.bn.running_mean.sum(),
        lambda net, x: net.bn(net.conv(x)) * net.bn.eps,  # an identity has none
        lambda net, x: net.bn(x),
    ],
)
def test_what_is_left_alone(forward):
    assert check(Net(forward)) == []


@pytest.mark.parametrize(
    "forward", [lambda net, x: net.bn(net.conv(x)), lambda net, x: net.bn(net.conv(x)).relu_() + x]
)
def test_what_is_not(forward):
    assert check(Net(forward)) == [("conv", "bn")]


def test_modules_in_two_places_or_run_twice_stay():
    shared = nn.BatchNorm2d(3)
    assert check(nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.ReLU(), nn.Conv2d(3, 3, 1), shared)) == []
    assert check(Twice()) == [("stem.0", "stem.1")]
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    tied[2].weight = tied[0].weight
    assert check(tied) == []


def test_wanted_layers_stay_as_they_are():
    assert check(ConvNet(), keep={"stem.0"}) == [("stage.0", "stage.1")]
    assert check(ConvNet(), keep={"stage.1"}) == [("stem.0", "stem.1")]
    assert len(check(ConvNet(), keep={"stage", "stem", "fc", "output"})) == 2
    wrapped = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))  # whose name is not the layer's own
    assert check(wrapped, keep={"0"}) == []
    assert check(wrapped) == [("0.0", "1")]


def test_layers_of_which_others_know_stay():
    model = ConvNet()
    handle = model.stem[0].register_forward_hook(lambda *_: None)
    assert fold_batchnorm(model, IMAGES)[1] == [("stage.0", "stage.1")]
    handle.remove()
    parametrizations.weight_norm(model.stage[0])
    assert fold_batchnorm(model, IMAGES)[1] == [("stem.0", "stem.1")]
    without = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    assert fold_batchnorm(without, IMAGES)[1] == []


def test_modes_inputs_and_outputs_of_any_kind():
    model = Pyramid().train()
    folded, pairs = fold_batchnorm(model, IMAGES)
    assert len(pairs) == 2
    assert model.training
    assert model.stem[1].training
    assert not folded.training
    folded, pairs = fold_batchnorm(TwoInputs(), {"extra": torch.randn(2, 5), "pixels": IMAGES})
    assert len(pairs) == 2


def test_half_precision_is_folded_in_wide_arithmetic():
    model = lived_in(ConvNet(16))
    folded = fold_batchnorm(copy.deepcopy(model).bfloat16(), IMAGES)[0]
    assert folded.stem[0].weight.dtype == torch.bfloat16
    expected = fold_batchnorm(model, IMAGES)[0].stem[0].weight
    torch.testing.assert_close(folded.stem[0].weight.float(), expected, rtol=2e-2, atol=1e-3)


def test_broken_models_say_so_and_lose_their_hooks():
    model = ConvNet()
    with pytest.raises(RuntimeError):
        fold_batchnorm(model, torch.randn(2, 1, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_norms_no_folds():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model("test_vit", num_classes=3)
    assert fold_batchnorm(model, torch.randn(2, 3, 160, 160))[1] == []
