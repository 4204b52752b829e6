"""Any two models pair without hints: each architecture of a mixed list teaches the one before it.

Random weights, the smallest variants, and reduced images where a model takes them.
"""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from small_nets import MLP, ChannelsLastNet, ConvNet, Pyramid, TokenNet, Wrapped
from torch import Tensor, nn

from diffkd import DiffKD, Distiller
from diffkd.features.layout import select_tensor

pytestmark = pytest.mark.filterwarnings("default")  # whatever other packages warn of is theirs

CLASSES = 10


def tv(name: str, size: int = 64, **options) -> tuple[str, int, Callable[[], nn.Module]]:
    build = getattr(torchvision.models, name)
    return f"torchvision {name}", size, partial(build, weights=None, num_classes=CLASSES, **options)


def tm(name: str, size: int = 64, **options) -> tuple[str, int, Callable[[], nn.Module]]:
    return f"timm {name}", size, partial(timm.create_model, name, num_classes=CLASSES, **options)


def hf(name: str, size: int = 32, **options) -> tuple[str, int, Callable[[], nn.Module]]:
    config, model = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForImageClassification")
    return f"transformers {name}", size, lambda: model(config(num_labels=CLASSES, **options))


TRANSFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"image_size": 32, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}

# In an order that puts families that differ next to one another.
ARCHITECTURES = [
    tv("resnet18"),
    tm("vit_tiny_patch16_224", img_size=64, depth=2),
    hf("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    tm("mixer_s32_224", img_size=64),
    tv("swin_t"),
    tm("mobilevit_xxs"),
    ("small convolutions", 64, ConvNet),
    hf("ViT", **TRANSFORMER),
    tv("mobilenet_v3_small"),
    tm("swinv2_cr_tiny_224", img_size=64, window_size=2, depths=(1, 1, 1, 1)),
    tv("densenet121"),
    tm("deit_tiny_distilled_patch16_224", img_size=64, depth=2),
    tm("convnext_atto"),
    tm("gmlp_ti16_224", img_size=64),
    hf("Swin", **SWIN),
    tv("shufflenet_v2_x0_5"),
    ("small tokens", 64, partial(TokenNet, prefix=3)),
    tm("efficientformer_l1", 224),
    tv("convnext_tiny"),
    hf("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    tm("vit_small_patch14_reg4_dinov2", 56, img_size=56, depth=2),
    tm("repvgg_a0"),
    ("wrapped channels last", 64, lambda: Wrapped(ChannelsLastNet())),
    tm("levit_128s", 224),
    tv("squeezenet1_1"),
    hf("Dinov2", hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8),
    tm("resmlp_12_224", img_size=64),
    tv("regnet_y_400mf"),
    tm("poolformer_s12"),
    hf("Beit", **TRANSFORMER),
    tv("googlenet", init_weights=False),
    tm("pit_ti_224", 224),
    ("a pyramid as mapping", 64, Pyramid),
    tm("maxvit_pico_rw_256", img_size=64),
    tv("efficientnet_b0"),
    tm("eva02_tiny_patch14_224", 56, img_size=56, depth=2),
    hf("MobileViT", 64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], image_size=64),
    tm("hrnet_w18_small"),
    tm("xcit_nano_12_p16_224", depth=2),
    tv("mnasnet0_5"),
    hf("DeiT", **TRANSFORMER),
    tm("edgenext_xx_small"),
    tv("alexnet"),
    tm("pvt_v2_b0"),
    hf("Segformer", hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2]),
    tm("ghostnet_050"),
]


def build(index: int) -> tuple[nn.Module, int]:
    _, size, make = ARCHITECTURES[index % len(ARCHITECTURES)]
    torch.manual_seed(index)
    return make(), size


def scale_to(size: int, images: Tensor) -> Tensor:
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def touched(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("index", range(len(ARCHITECTURES)), ids=[name for name, *_ in ARCHITECTURES])
def test_pairs_without_hints(index):
    student, size = build(index)
    teacher, teacher_size = build(index + 1)
    alone, frozen = copy.deepcopy(student), copy.deepcopy(teacher.state_dict())
    images = torch.randn(2, 3, size, size)
    distiller = Distiller(
        student,
        teacher,
        example=images,
        method=partial(DiffKD, ae_channels=12),
        teacher_input=partial(scale_to, teacher_size),
    )
    assert distiller.names[-1] == "output"
    assert len(distiller.names) == 2

    # The student returns what it returns alone, to the bit.
    distiller.eval()
    alone.eval()
    with torch.no_grad():
        assert torch.equal(select_tensor(distiller(images)[0]), select_tensor(alone(images)))

    # Losses are finite, every part of the methods learns, and so does whatever learns without them.
    distiller.train()
    alone.train()
    task = select_tensor(alone(images))
    task.square().mean().backward()
    output, losses = distiller(images)
    (select_tensor(output).square().mean() + sum(losses.values())).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert touched(distiller.methods) == {name for name, _ in distiller.methods.named_parameters()}
    assert touched(alone) <= touched(student)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in distiller.parameters())

    # The features reach into the student by themselves, and nothing reaches the teacher.
    distiller.zero_grad()
    sum(loss for name, loss in distiller(images)[1].items() if not name.startswith("output/")).backward()
    assert touched(student)
    assert not touched(teacher)
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())


def test_flat_vectors_pair_too():
    x = torch.randn(4, 12)
    _, losses = Distiller(MLP(width=8), MLP(width=32), example=x)(x)
    assert len(losses) == 4
    assert all(loss.isfinite() for loss in losses.values())


def test_there_are_enough_of_every_kind():
    names = [name for name, *_ in ARCHITECTURES]
    assert len(set(names)) == len(names) >= 36
    for source, count in (("torchvision", 10), ("timm", 15), ("transformers", 8), ("small", 2)):
        assert sum(name.startswith(source) for name in names) >= count
