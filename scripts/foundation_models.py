"""Build the foundation models of docs/representation.md with random weights, and print its table of published sizes.

    python scripts/foundation_models.py                  # all of them, one at a time: minutes, 2 GiB of memory
    python scripts/foundation_models.py dinov2 --write   # those with a text in their names; write their rows there

Each is read as a teacher is: images of its own size and of about 96 pixels go through it beside a small student.
Nothing is downloaded: timm has its configurations, those of transformers are written down here.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from diffkd import Distiller, FitNet
from diffkd.models import input_normalization, load_backbone
from diffkd.models.backbones import patch_size, with_positions_of
from diffkd.models.normalization import own_size

PAGE = Path(__file__).parents[1] / "docs" / "representation.md"
HEAD = ("teacher", "parameters", "own size", "map", "embedding", "prefix", "mean of the images", "another size")

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16, "image_size": 224}
SMALL = BASE | {"hidden_size": 384, "num_attention_heads": 6}
DINOV2 = SMALL | {"patch_size": 14, "image_size": 518}
# By name on the Hub: the class of the configuration, and its sizes where they are not its defaults. Of RADIO's tokens
# before the patches the defaults are taken, which are those of its largest model.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "facebook/dinov2-small": ("Dinov2Config", DINOV2),
    "facebook/dinov2-with-registers-small": ("Dinov2WithRegistersConfig", DINOV2 | {"num_register_tokens": 4}),
    "facebook/dinov3-vits16-pretrain-lvd1689m": ("DINOv3ViTConfig", SMALL | {"num_register_tokens": 4}),
    "facebook/dinov3-convnext-tiny-pretrain-lvd1689m": ("DINOv3ConvNextConfig", {}),
    "google/siglip2-base-patch16-224": ("SiglipConfig", {"vision_config": BASE, "text_config": {"vocab_size": 256000}}),
    "openai/clip-vit-base-patch16": ("CLIPConfig", {"vision_config": BASE}),
    "facebook/vit-mae-base": ("ViTMAEConfig", BASE),
    "nvidia/C-RADIOv3-B": ("RadioConfig", BASE),
}
MODELS = (
    "timm/vit_small_patch14_dinov2.lvd142m",
    "timm/vit_small_patch14_reg4_dinov2.lvd142m",
    "timm/vit_small_patch16_dinov3.lvd1689m",
    "timm/convnext_tiny.dinov3_lvd1689m",
    "timm/vit_base_patch16_siglip_224.v2_webli",
    "timm/vit_base_patch16_clip_224.openai",
    "timm/resnet50_clip.openai",
    "timm/vit_base_patch16_224.mae",
    "timm/vit_base_patch16_radio_v3.c_radio",
    *(f"hf/{name}" for name in PUBLISHED),
)


def row_of(name: str) -> tuple[str, ...]:
    """Return the cells of a model's row: what is found of it, and what it makes of images of two sizes."""
    with tempfile.TemporaryDirectory() as folder:
        where = name
        if name.startswith("hf/"):
            kind, sizes = PUBLISHED[name.removeprefix("hf/")]
            getattr(transformers, kind)(**sizes).save_pretrained(folder)
            where = f"hf/{folder}"
        model = load_backbone(where).eval()
        normalization = input_normalization(model, where)
    parameters = sum(one.numel() for one in model.parameters())
    side = (own_size(model) or (224, 224))[0]
    step = (patch_size(model) or (32, 32))[0]
    shape, pooled, prefix = _seen(model, side)
    return (
        f"`{name}`",
        f"{parameters / 1e6:.1f} M",
        str(side),
        shape,
        pooled,
        prefix,
        ", ".join(f"{value:.3f}" for value in normalization[0]) if normalization else "not said",
        _at_another_size(model, -(-96 // step) * step, side),
    )


def _seen(model: nn.Module, side: int) -> tuple[str, str, str]:
    """Return the shapes of the paired map and embedding, and the number of tokens before the patches."""
    student = load_backbone("timm/test_resnet")
    example = torch.randn(2, 3, side, side)
    distiller = Distiller(student, model, example=example, method=FitNet, representations=True)
    found = {}
    for pair, (_, reader) in zip(distiller.pairs, distiller.readers, strict=True):
        found[pair.name or "map"] = reader.shapes[0], reader.layouts[0]
    shape, layout = found["map"]
    return (
        "x".join(map(str, (shape.channels, *shape.size))),
        str(found["embedding"][0].channels) if "embedding" in found else "none",
        str(layout.prefix),
    )


def _at_another_size(model: nn.Module, side: int, own: int) -> str:
    """Return what becomes of images of another size: taken as they are, by resampled positions, or resized."""
    try:
        with torch.no_grad():
            model(torch.randn(2, 3, side, side))
        how, taken = "as it is", model
    except Exception:  # models may raise anything for images of another size
        how, taken = "positions resampled", with_positions_of(model, (side, side))
    try:
        shape = _seen(taken, side)[0]
    except ValueError:
        return f"{side}: resized to {own}"
    return f"{side}: {shape}, {how}"


def line(cells: tuple[str, ...]) -> str:
    """Return a line of the table."""
    return f"| {' | '.join(cells)} |"


def write(rows: dict[str, str]) -> None:
    """Replace the rows of the table of the page, by their first cell, and add those that are not in it."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(line(HEAD)) + 2
    end = next(index for index in range(start, len(lines) + 1) if not lines[index].startswith("|"))
    kept = {one.split(" | ")[0]: one for one in lines[start:end]}
    kept |= {one.split(" | ")[0]: one for one in rows.values()}
    order = [f"| `{name}`" for name in MODELS]
    table = [kept[first] for first in sorted(kept, key=order.index)]
    PAGE.write_text("\n".join([*lines[:start], *table, *lines[end:], ""]), encoding="utf-8")


def main() -> None:
    """Print a row for each model, and write them into the page if asked to."""
    parser = argparse.ArgumentParser(description="Build foundation models with random weights, and describe them.")
    parser.add_argument("names", nargs="*", help="texts in the names of the models; all without")
    parser.add_argument("--write", action="store_true", help="write the rows into docs/representation.md")
    given = parser.parse_args()
    chosen = [name for name in MODELS if not given.names or any(text in name for text in given.names)]
    if not chosen:
        parser.error(f"no model has {' or '.join(given.names)} in its name; there are {', '.join(MODELS)}")
    print(line(HEAD), line(("---",) * len(HEAD)), sep="\n", flush=True)  # noqa: T201
    rows = {}
    for name in chosen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows[name] = line(row_of(name))
        print(rows[name], flush=True)  # noqa: T201
        if given.write:
            write({name: rows[name]})


if __name__ == "__main__":
    main()
