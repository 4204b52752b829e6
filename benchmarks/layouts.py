"""How the layers of many networks are read: the last map of each, and what a change in one corner tells.

    uv run python -m benchmarks.layouts

The networks are small ones of timm, of most of its families, with random weights. The last map before pooling is held
against what timm's own `forward_features` returns. And every layer whose layout its shape leaves in no doubt is put in
doubt, by leaving it as many channels as it has positions on a side, or by any number of prefix tokens before any grid;
then `diffkd.features.ambiguous_layouts` decides among the readings.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.report import RESULTS, machine, save, table
from diffkd.distill.stages import last_feature
from diffkd.features.ambiguous_layouts import change_corner, most_local, prefix_tokens
from diffkd.features.forward import input_size_of
from diffkd.features.layers import Layer, list_layers
from diffkd.features.layout import MAX_PREFIX_TOKENS, Layout, fitting_layouts, select_tensor
from diffkd.features.trace import run_watched

NETWORKS = (
    "test_resnet", "resnetv2_18", "regnetx_002", "densenet121", "test_efficientnet", "mobilenetv3_small_050",
    "ghostnet_050", "hrnet_w18_small", "dla46x_c", "inception_v3", "test_byobnet", "test_nfnet", "test_convnext",
    "inception_next_atto", "poolformer_s12", "test_mambaout", "edgenext_xx_small", "efficientvit_b0", "fastvit_t8",
    "mobilevit_xxs", "pvt_v2_b0", "twins_svt_small", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224",
    "test_coatnet", "hiera_tiny_224", "test_vit", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
    "vit_tiny_patch16_dinov3_qkvb", "cait_xxs24_224", "xcit_nano_12_p8_224", "crossvit_tiny_240", "pit_ti_224",
    "gmlp_ti16_224", "resmlp_12_224", "sequencer2d_s", "volo_d1_224",
)  # fmt: skip
SIZES = ((64, 64), (128, 128), (160, 224))


def build(name: str, size: tuple[int, int]) -> nn.Module | None:
    """Return the network for images of this size, None if it takes none."""
    tries: tuple[dict[str, Any], ...] = ({}, {"img_size": size})
    for options in tries:
        try:
            model: nn.Module = timm.create_model(name, num_classes=10, **options).eval()
            with torch.no_grad():
                model(torch.zeros(1, 3, *size))
        except Exception:  # each network refuses sizes and options in its own way
            continue
        return model
    return None


def last_map(model: Any, layers: Sequence[Layer], images: Tensor) -> dict[str, Any]:
    """Return the last feature, and whether it has the channels and positions of what timm calls the features."""
    last = last_feature(layers)
    with torch.no_grad():
        features = select_tensor(model.forward_features(images))
    if last is None or last.feature_shape is None or features is None:
        return {"layer": None, "agrees": False}
    size = last.feature_shape.size
    held = last.feature_shape.channels * (size[0] * size[1] if size else 1)
    prefix = getattr(model, "num_prefix_tokens", 0) if features.ndim == 3 else 0
    expected = features[0].numel() - prefix * model.num_features
    agrees = last.feature_shape.channels == model.num_features and held == expected
    return {"layer": last.name, "shape": str(last.feature_shape), "layout": str(last.layout), "agrees": agrees}


def readings(tensor: Tensor, layout: Layout) -> tuple[Tensor, list[Layout]] | None:
    """Return a tensor that could be read in several ways, of which `layout` is the right one."""
    if layout.kind == "tokens":
        found = [
            Layout("tokens", prefix, (height, count // height))
            for prefix in range(MAX_PREFIX_TOKENS + 1)
            for count in [tensor.shape[1] - prefix]
            for height in range(2, count)
            if count % height == 0 and height <= 2 * (count // height) <= 4 * height
        ]
        return (tensor, found) if layout in found and len(found) > 1 else None
    height, width = layout.size(tensor.shape)
    side = width if layout.kind == "nchw" else height
    if height != width or height < 2 or layout.channels(tensor.shape) < side:
        return None
    cropped = tensor[:, :side] if layout.kind == "nchw" else tensor[..., :side]
    return cropped, [Layout("nchw"), Layout("nhwc")]


def decisions(model: nn.Module, layers: Sequence[Layer], images: Tensor) -> Iterator[str]:
    """Yield "right", "wrong" or "undecided" for each layer whose layout is in no doubt."""
    before, after = (
        {one.name: one.tensor for one in run_watched(model, x)[1]} for x in (images, change_corner(images))
    )
    for layer in layers[:-1]:
        fits = fitting_layouts(layer.shape, input_size_of(images), prefix_tokens(model))
        if not layer.is_map or layer.instead is not None or fits != [layer.layout]:
            continue
        if (several := readings(before[layer.name], fits[0])) is not None:
            changed = readings(after[layer.name], fits[0])
            assert changed is not None
            found = most_local(several[1], several[0], changed[0])
            yield "undecided" if found is None else "right" if found == fits[0] else "wrong"


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Read all networks at all sizes, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layouts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(words)
    rows: list[dict[str, Any]] = []
    for name, size in ((name, size) for name in chosen.networks for size in SIZES):
        torch.manual_seed(0)
        model = build(name, size)
        if model is None:
            continue
        images = torch.randn(2, 3, *size)
        layers = list_layers(model, images)
        counts = Counter(decisions(model, layers, images))
        rows.append({"network": name, "size": size, **last_map(model, layers, images), "decisions": dict(counts)})
        print(name, "x".join(map(str, size)), *(rows[-1][key] for key in ("layer", "shape", "agrees")), dict(counts))
    total: Counter[str] = sum((Counter(row["decisions"]) for row in rows), Counter())
    agree = sum(row["agrees"] for row in rows)
    summary = {"read": len(rows), "as timm": agree, **{key: total[key] for key in ("right", "wrong", "undecided")}}
    print(f"\n{table([list(summary), [str(value) for value in summary.values()]])}")
    result = {"machine": machine("cpu"), "timm": timm.__version__, "summary": summary, "rows": rows}
    save(chosen.out, "layouts", result)
    return result


if __name__ == "__main__":
    main()
