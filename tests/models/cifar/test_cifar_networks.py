"""What holds for every network for small images: size, shapes, gradients, features that stay as they are."""

import copy
from typing import Any

import pytest
import torch
from rounding import EXACT
from torch import Tensor, nn

from diffkd import models
from diffkd.models import load_model, model_names

# Parameters at 100 classes: the exact count, and the number in millions that the literature prints.
PUBLISHED = {
    "compact_resnet8": (22_924, "0.02"),  # these two are our own
    "compact_resnet14": (181_108, "0.18"),
    "resnet8": (83_892, "0.08"),
    "resnet14": (181_108, "0.18"),
    "resnet20": (278_324, "0.28"),
    "resnet32": (472_756, "0.47"),
    "resnet44": (667_188, "0.67"),
    "resnet56": (861_620, "0.86"),
    "resnet110": (1_736_564, "1.74"),
    "resnet8x4": (1_233_540, "1.23"),
    "resnet32x4": (7_433_860, "7.43"),
    "resnet50": (23_705_252, "23.71"),
    "wrn_16_1": (180_916, "0.18"),
    "wrn_16_2": (703_284, "0.70"),
    "wrn_28_10": (36_536_884, "36.54"),
    "wrn_40_1": (569_780, "0.57"),
    "wrn_40_2": (2_255_156, "2.26"),
    "mobilenetv2": (812_836, "0.81"),
    "shufflenetv1": (949_258, "0.95"),
    "shufflenetv2": (1_355_528, "1.36"),
}

# The last map for a 32x32 image: the module whose output it is, and its shape.
LAST_MAP = {
    "resnet8": ("layer3", (64, 8, 8)),
    "resnet8x4": ("layer3", (256, 8, 8)),
    "resnet20": ("layer3", (64, 8, 8)),
    "wrn_16_2": ("relu", (128, 8, 8)),
    "mobilenetv2": ("head", (1280, 2, 2)),
    "shufflenetv1": ("layer3", (960, 4, 4)),
    "shufflenetv2": ("head", (1024, 4, 4)),
    "resnet50": ("layer4", (2048, 4, 4)),
}
families = pytest.mark.parametrize("name", LAST_MAP)


def test_every_network_is_counted() -> None:
    assert [f"cifar/{name}" for name in sorted(PUBLISHED)] == model_names("cifar")
    assert all(callable(getattr(models, name)) and name in models.__all__ for name in PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = load_model(f"cifar/{name}")
    count = sum(p.numel() for p in model.parameters())
    assert (count, f"{count / 1e6:.2f}") == PUBLISHED[name]


@families
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 33, 17), (2, 9, 40)])
def test_any_image_size_and_channels(name: str, channels: int, height: int, width: int) -> None:
    model = load_model(f"cifar/{name}", num_classes=7, in_channels=channels).eval()
    logits = model(torch.randn(2, channels, height, width))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@families
def test_last_map_is_the_output_of_a_module_and_explains_the_logits(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAST_MAP[name]
    model = load_model(f"cifar/{name}", num_classes=5).double().eval()
    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda _module, _args, output: seen.append(output))
    logits = model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert seen[0].shape == (2, *shape)
    assert (seen[0] >= 0).all()
    explained = nn.functional.linear(seen[0].mean((2, 3)), model.fc.weight, model.fc.bias)
    torch.testing.assert_close(explained, logits, **EXACT)


@families
def test_no_output_is_overwritten_and_no_module_runs_twice(name: str) -> None:
    model = load_model(f"cifar/{name}", num_classes=5)
    kept: dict[str, tuple[Tensor, int, Tensor]] = {}

    def keep(layer: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            assert layer not in kept, f"{layer} runs twice"
            kept[layer] = (output, output._version, output.detach().clone())

        return hook

    for layer, module in model.named_modules():
        module.register_forward_hook(keep(layer))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert kept.keys() == dict(model.named_modules()).keys()
    for layer, (output, version, copied) in kept.items():
        assert output._version == version, layer
        assert torch.equal(output, copied), layer


@families
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = load_model(f"cifar/{name}", num_classes=5)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@families
def test_initialisation(name: str) -> None:
    torch.manual_seed(0)
    model = load_model(f"cifar/{name}")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@families
def test_copies_and_states_are_whole(name: str) -> None:
    model = load_model(f"cifar/{name}", num_classes=5).eval()
    images = torch.randn(2, 3, 16, 16)
    other = load_model(f"cifar/{name}", num_classes=5).eval()
    other.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.equal(other(images), model(images))


def test_narrow_resnet() -> None:
    model = models.resnet8(num_classes=10, in_channels=1, width=8)
    assert sum(p.numel() for p in model.parameters()) == 19_810
    assert model.eval()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.CifarResNet(18, (16, 16, 32, 64)), "depth 18 is not 6 n"),
        (lambda: models.CifarResNet(2, (16, 16, 32, 64)), "depth 2 is not 6 n"),
        (lambda: models.WideResNet(18, 1), "depth 18 is not 6 n"),
        (lambda: models.WideResNet(16, 0), "widen_factor 0"),
        (lambda: models.mobilenetv2(width=0.01), "width 0.01"),
    ],
)
def test_impossible_sizes_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
