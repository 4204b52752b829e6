"""Foundation models as teachers, with random weights of shrunk configurations: each is read as its authors mean it."""

import pytest
import timm
import torch
import transformers
from scripts.foundation_models import HEAD, MODELS, PAGE, line
from transformers import PreTrainedConfig

from diffkd import Distiller, FitNet
from diffkd.models import input_normalization, load_backbone
from diffkd.models.backbones import patch_size, with_positions_of

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
MLP = {"intermediate_size": 64}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def config(name: str, **options: object) -> PreTrainedConfig:
    return getattr(transformers, f"{name}Config")(**options)


CASES = {
    "dinov2": (config("Dinov2", **SMALL | MLP), 1, IMAGENET, 32),
    "dinov2 with registers": (config("Dinov2WithRegisters", **SMALL | MLP, num_register_tokens=4), 5, IMAGENET, 32),
    "dinov3": (config("DINOv3ViT", **SMALL | MLP, num_register_tokens=4), 5, IMAGENET, 32),
    "siglip": (config("Siglip", vision_config=SMALL | MLP, text_config=TEXT), 0, HALF, 32),
    "clip": (config("CLIP", vision_config=SMALL | MLP, text_config=TEXT), 1, CLIP, 32),
    "mae": (config("ViTMAE", **SMALL | MLP), 1, IMAGENET, 32),
    "radio": (config("Radio", **SMALL), 10, ((0.0,) * 3, (1.0,) * 3), 64),
}


def distilled(teacher, size):
    student = load_backbone("timm/test_resnet")
    return Distiller(student, teacher, example=torch.randn(2, 3, *size), method=FitNet, representations=True)


@pytest.mark.parametrize("family", list(CASES))
def test_of_transformers(family, tmp_path):
    made, prefix, normalization, width = CASES[family]
    made.save_pretrained(tmp_path)
    teacher = load_backbone(f"hf/{tmp_path}").eval()
    assert input_normalization(teacher, f"hf/{tmp_path}") == normalization
    assert patch_size(teacher) == (16, 16)
    tokens, pooled = distilled(teacher, (64, 64)).readers
    assert (tokens[1].layouts[0].prefix, tokens[1].layouts[0].grid) == (prefix, (4, 4))
    assert pooled[1].shapes[0].channels == width
    resized = distilled(with_positions_of(teacher, (96, 96)), (96, 96))
    assert resized.readers[0][1].layouts[0].grid == (6, 6)


@pytest.mark.parametrize(
    ("name", "prefix", "normalization"),
    [
        ("vit_small_patch14_dinov2", 1, IMAGENET),
        ("vit_small_patch14_reg4_dinov2", 5, IMAGENET),
        ("vit_small_patch16_dinov3", 5, IMAGENET),
        ("vit_base_patch16_siglip_224", 0, HALF),
        ("vit_base_patch16_clip_224", 1, CLIP),
        ("vit_base_patch16_224.mae", 1, IMAGENET),
        ("vit_base_patch16_radio_v3", 8, CLIP),
    ],
)
def test_of_timm(name, prefix, normalization):
    teacher = timm.create_model(name, num_classes=0, embed_dim=32, num_heads=2, depth=2).eval()
    assert input_normalization(teacher, f"timm/{name}") == normalization
    patch = patch_size(teacher)
    size = (4 * patch[0], 4 * patch[1])
    (_, tokens), (_, pooled) = distilled(with_positions_of(teacher, size), size).readers
    assert (tokens.layouts[0].prefix, tokens.layouts[0].grid) == (prefix, (4, 4))
    assert pooled.shapes[0].role == "feature"
    with pytest.raises(ValueError, match=r"no whole number of patches .* give \d+x\d+"):
        with_positions_of(teacher, (size[0] + 1, size[1]))


def test_tokens_of_several_sizes_of_images_are_refused(tmp_path):
    vision = MLP | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config("Siglip2", vision_config=vision).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="spatial_shapes, and here only images are: name a vision model"):
        load_backbone(f"hf/{tmp_path}")


def test_the_table_of_published_sizes_has_every_model():
    """Its rows take minutes, and are made by hand: python scripts/foundation_models.py --write."""
    page = PAGE.read_text(encoding="utf-8")
    table = page.partition(line(HEAD))[2].partition("\n\n")[0].splitlines()[2:]
    assert [row.split("`")[1] for row in table] == list(MODELS)
