import pytest
import timm
import torch
import torchvision
import transformers
from small_nets import ConvNet, TokenNet, Wrapped
from torch import nn

from diffkd import Distiller, FitNet, list_layers
from diffkd.features.ambiguous_layouts import prefix_tokens

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 32}


def with_parameters(**counts: int | tuple[int, ...]) -> nn.Module:
    net = nn.Module()
    for name, count in counts.items():
        net.register_parameter(name, nn.Parameter(torch.zeros(count if isinstance(count, tuple) else (1, count, 8))))
    return net


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (ConvNet(), set()),
        (TokenNet(prefix=3), set()),
        (TokenNet(prefix=3, tell=True), {3}),
        (Wrapped(TokenNet(prefix=3, tell=True)), {3}),
        (with_parameters(cls_token=1, register_tokens=4, mask_token=1, pos_embed=9), {5}),
        (with_parameters(cls_token=1, storage_tokens=4), {5}),
        (with_parameters(cls_token=1, distillation_token=1), {2}),
        (with_parameters(class_embedding=(8,)), {1}),
        (with_parameters(cls_token1=1, cls_token2=1), {1}),
        (nn.ModuleList([with_parameters(cls_token=1), with_parameters(cls_token=1, reg_token=4)]), {1, 5}),
        (timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, reg_tokens=2), {3}),
        (timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1), {2}),
        (torchvision.models.VisionTransformer(32, 16, 1, 1, 8, 8), {1}),
        (transformers.ViTModel(transformers.ViTConfig(**SMALL)), {1}),
        (transformers.DeiTModel(transformers.DeiTConfig(**SMALL)), {2}),
        (transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SMALL)), {5}),
        (transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)), {1}),
    ],
)
def test_models_say_how_many_there_are(model, told):
    assert prefix_tokens(model) == told


class LateClassToken(nn.Module):
    """Its class token joins the grid after the first layer, as in CaiT; 250 x 130 pixels are 15 x 8 patches of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.cls_token = nn.Conv2d(3, 8, 16, 16), nn.Parameter(torch.randn(1, 1, 8))
        self.early, self.late, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.early(self.patches(images).flatten(2).transpose(1, 2))
        return self.head(self.late(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))[:, 0])


@pytest.mark.parametrize("size", [(64, 64), (250, 130)])
def test_layers_before_the_class_token_are_understood(size):
    images = torch.randn(2, 3, *size)
    layers = {layer.name: layer.layout for layer in list_layers(LateClassToken(), images)}
    grid = size[0] // 16, size[1] // 16
    assert [(layers[name].prefix, layers[name].grid) for name in ("early", "late")] == [(0, grid), (1, grid)]


def test_a_transformer_of_torchvision_on_an_image_that_is_not_square():
    class Tall(torchvision.models.VisionTransformer):
        """Takes 37 patches in front of it as they come."""

        def _process_input(self, x):
            return self.conv_proj(x).flatten(2).transpose(1, 2)

    model = Tall(96, 16, 1, 1, 8, 8, num_classes=10)  # 36 positions, as 9x4 of 144x64 pixels has
    distiller = Distiller(ConvNet(), model, example=torch.randn(2, 3, 144, 64), method=FitNet)
    assert distiller.rows()[0][4] == "8x9x4 tokens+1"
