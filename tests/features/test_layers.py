import copy
from collections import namedtuple

import pytest
import torch
import torchvision
from small_nets import MLP, ChannelsLastNet, ConvNet, Pyramid, TokenNet, Twice, TwoInputs, Wrapped
from torch import nn

from diffkd import Layout, list_layers
from diffkd.features.forward import evaluation_mode
from diffkd.features.layers import find_layer

IMAGES = torch.randn(2, 3, 16, 16)


def by_name(model, example=IMAGES):
    return {layer.name: layer for layer in list_layers(model, example)}


class TestInPlaceTrap:
    def test_resnet18_overwrites_17_of_its_layers(self):
        layers = list_layers(torchvision.models.resnet18(weights=None), torch.randn(1, 3, 64, 64))
        lost = [layer for layer in layers if layer.instead is not None and layer.calls == 1]
        assert len(lost) == 17
        assert {layer.name for layer in lost} >= {"bn1", "layer1.0.bn1", "layer4.1.bn2"}
        assert all(layer.type == "BatchNorm2d" for layer in lost)

    def test_the_layer_named_instead_holds_what_was_meant(self):
        model = torchvision.models.resnet18(weights=None).eval()
        example = torch.randn(2, 3, 64, 64)
        layers = list_layers(model, example)
        lost = next(layer for layer in layers if layer.name == "bn1")
        assert lost.instead == "relu"
        with pytest.raises(ValueError, match=r"'bn1' of student ResNet has its output overwritten.*take 'relu' inst"):
            find_layer(layers, "bn1", "student ResNet")
        seen = {}
        for name in ("bn1", "relu"):
            model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        model(example)
        assert seen["bn1"].data_ptr() == seen["relu"].data_ptr()
        # Relu runs once in a layer of its own, but twice in every block: there the block around is named.
        blocks = {layer.name: layer.instead for layer in layers if layer.name.startswith("layer1.0.")}
        assert blocks["layer1.0.bn2"] == "layer1.0"
        for name in filter(None, {layer.instead for layer in layers if layer.instead}):
            assert find_layer(layers, name, "student ResNet").instead is None

    def test_a_tensor_changed_through_a_view(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

            def forward(self, x):
                x = self.conv(x)
                x[:, 0].zero_()
                return self.fc(x.mean(dim=(2, 3)))

        layers = list_layers(Net(), IMAGES)
        assert layers[0].instead == ""
        with pytest.raises(ValueError, match="take a layer around it"):
            find_layer(layers, "conv", "student Net")

    def test_a_dropout_that_overwrites_its_input_in_training_only(self):
        def net(*, inplace):
            return nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5, inplace))

        model = net(inplace=True)
        kept = copy.deepcopy(model.state_dict())
        layers = by_name(model)
        assert {name: layer.instead for name, layer in layers.items() if layer.instead} == {"1": "3", "2": "3"}
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        assert not any(layer.instead for layer in by_name(net(inplace=False)).values())


def test_shapes_layouts_and_order():
    layers = list_layers(ConvNet(4), torch.randn(2, 3, 16, 24))
    assert [layer.name for layer in layers][-3:] == ["pool", "fc", "output"]
    found = {layer.name: layer for layer in layers}
    assert (found["stage"].shape, str(found["stage"].feature_shape)) == ((2, 8, 4, 6), "8x4x6")
    assert found["stage"].is_map
    assert not found["pool"].is_map
    assert found["output"].type == "ConvNet"
    assert found["output"].feature_shape.role == "logits"
    assert found["fc"].feature_shape.role == "feature"


@pytest.mark.parametrize("tell", [True, False])
def test_tokens(tell):
    layer = by_name(TokenNet(8, prefix=3, tell=tell))["blocks.1"]
    assert (layer.layout.kind, layer.layout.prefix, layer.layout.grid) == ("tokens", 3, (4, 4))
    assert str(layer.feature_shape) == "8x4x4"


@pytest.mark.parametrize(
    ("net", "layer", "layout"),
    [
        (ConvNet(), "stage", Layout("nchw")),
        (ChannelsLastNet(), "block", Layout("nhwc")),
        (TokenNet(tell=True), "blocks", Layout("tokens", 1, (8, 8))),
    ],
)
def test_a_model_may_resize_its_images_to_other_proportions(net, layer, layout):
    found = by_name(nn.Sequential(nn.Upsample((32, 32)), net), torch.randn(2, 3, 16, 28))
    assert found[f"1.{layer}"].layout == layout
    assert found[f"1.{layer}"].feature_shape.size == (8, 8)


def test_borders_that_are_left_out_change_the_proportions():
    stage = nn.Sequential(nn.Conv2d(3, 4, 7), nn.MaxPool2d(3, 2))
    found = by_name(nn.Sequential(stage, nn.Flatten(), nn.LazyLinear(10)), torch.randn(2, 3, 16, 28))
    assert str(found["0"].feature_shape) == "4x4x10"  # and no 4x7


def test_a_layer_that_runs_twice_is_refused_with_the_layer_to_take():
    layers = list_layers(Twice(), IMAGES)
    assert [layer.name for layer in layers].count("shared") == 1
    with pytest.raises(ValueError, match=r"'shared' of teacher Twice runs several times .* take 'around' instead"):
        find_layer(layers, "shared", "teacher Twice")


def test_unknown_layers_are_answered_with_the_nearest():
    layers = list_layers(ConvNet(), IMAGES)
    with pytest.raises(ValueError, match=r"layer 'stag' is not in student ConvNet; nearest: 'stage' \(8x4x4\)"):
        find_layer(layers, "stag", "student ConvNet")
    with pytest.raises(ValueError, match=r"nearest: 'fc' \(10\), 'output' \(10\)"):
        find_layer(layers, "qqqqqqqq", "student ConvNet")


class TestExamples:
    def test_flat_vectors(self):
        assert by_name(MLP(), torch.randn(2, 12))["first"].feature_shape.channels == 16

    def test_tuples_and_mappings(self):
        pixels, extra = torch.randn(2, 3, 16, 24), torch.randn(2, 5)
        positional, named = (
            by_name(TwoInputs(), (pixels, extra)),
            by_name(TwoInputs(), {"extra": extra, "pixels": pixels}),
        )
        assert positional == named
        assert positional["image.stage"].feature_shape.size == (4, 6)

    def test_named_tuples(self):
        inputs = namedtuple("inputs", ["pixels", "extra"])(torch.randn(2, 3, 16, 24), torch.randn(2, 5))
        assert by_name(TwoInputs().double(), inputs) == by_name(TwoInputs().double(), tuple(inputs))

    def test_are_moved_to_the_models_type(self):
        assert by_name(ConvNet().double(), IMAGES)["output"].shape == (2, 10)
        assert by_name(ConvNet().bfloat16(), (IMAGES,))["output"].shape == (2, 10)

    def test_integers_stay_integers(self):
        model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))
        assert by_name(model, torch.randint(7, (2, 3)))["0"].shape == (2, 3, 4)

    def test_that_do_not_fit_are_named(self):
        with pytest.raises(ValueError, match=r"ConvNet cannot take an example of shape \(2, 1, 16, 16\) \(RuntimeErr"):
            list_layers(ConvNet(), torch.randn(2, 1, 16, 16))


@pytest.mark.parametrize("change", [torch.fft.fft2, torch.Tensor.long])
def test_what_is_no_real_numbers_is_no_feature(change):
    class Changed(nn.Module):
        def forward(self, x):
            return change(x)

    layers = list_layers(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), Changed()), torch.randn(2, 3, 8, 8))
    assert [layer.layout for layer in layers] == [Layout("nchw"), None, None]


def test_outputs_without_a_tensor_are_named():
    class Mute(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ValueError, match="Mute returns no tensor but NoneType"):
        list_layers(Mute(), IMAGES)


def test_outputs_may_be_mappings():
    layers = by_name(Pyramid())
    assert layers["output"].shape == (2, 10)
    assert layers["levels"].shape == (2, 4, 8, 8)


def test_errors_of_the_model_are_cut_to_one_line():
    with pytest.raises(ValueError, match="cannot take an example of shape str") as error:
        list_layers(ConvNet(), "images")
    assert "\n" not in str(error.value)


def test_a_child_called_output_does_not_shadow_the_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.output = nn.Conv2d(3, 4, 3), nn.Linear(4, 6)

        def forward(self, x):
            return self.output(self.conv(x).mean(dim=(2, 3)))[:, :5]

    layers = list_layers(Net(), IMAGES)
    assert [(layer.name, layer.shape) for layer in layers] == [("conv", (2, 4, 14, 14)), ("output", (2, 5))]


def test_the_model_is_left_as_it_was():
    model = Wrapped(nn.Sequential(ConvNet(), nn.Dropout(0.5)))
    model.train()
    model.net[0][0][0].stem.eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    list_layers(model, IMAGES)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_and_modes_are_put_back_when_the_model_fails():
    model = ConvNet()
    with pytest.raises(ValueError, match="cannot take"):
        list_layers(model, torch.randn(2, 5))
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())


def test_evaluation_mode_is_put_back_after_an_error():
    model = ConvNet()
    model.register_forward_hook(lambda *_: next(iter(())))
    with pytest.raises(StopIteration), evaluation_mode(model):
        model(IMAGES)
    assert model.stem.training


def test_wrappers_of_torch_are_seen_through():
    model = ConvNet()
    plain = list_layers(model, IMAGES)
    assert list_layers(nn.DataParallel(model), IMAGES) == plain
    assert list_layers(torch.compile(model, backend="eager"), IMAGES) == plain
