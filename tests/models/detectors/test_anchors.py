import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models import detection

from diffkd.models.detectors.pyramid_detectors import Family, build_anchors, fcos_finest

USUAL = {"fasterrcnn": (4, 8, 16, 32, 64), "retinanet": (8, 16, 32, 64, 128), "fcos": (8, 16, 32, 64, 128)}


@pytest.mark.parametrize("family", ["fasterrcnn", "retinanet", "fcos"])
def test_at_scale_1_they_are_torchvisions_own(family: Family) -> None:
    with torch.device("meta"):
        published = detection.__dict__[f"{family}_resnet50_fpn"](weights_backbone=None)
    own = published.rpn.anchor_generator if family == "fasterrcnn" else published.anchor_generator
    anchors = build_anchors(family, USUAL[family], 1.0)
    assert anchors.sizes == own.sizes
    assert anchors.aspect_ratios == own.aspect_ratios


@given(
    st.sampled_from(["fasterrcnn", "retinanet", "fcos"]),
    st.lists(st.integers(1, 64), min_size=1, max_size=5, unique=True).map(sorted),
    st.floats(1e-3, 4),
)
def test_none_is_empty_and_all_grow_with_the_stride(family: Family, strides: list[int], scale: float) -> None:
    anchors = build_anchors(family, strides, scale)
    sides = [cell[:, 2:] - cell[:, :2] for cell in anchors.cell_anchors]
    assert len(sides) == len(strides)
    assert all(side.min() >= 1 for side in sides)
    assert all(coarse.max() >= fine.max() for fine, coarse in itertools.pairwise(sides))
    assert len(set(anchors.num_anchors_per_location())) == 1


def test_small_images_get_small_anchors() -> None:
    assert build_anchors("fasterrcnn", USUAL["fasterrcnn"], 0.25).sizes == ((8,), (16,), (32,), (64,), (128,))
    assert build_anchors("fcos", USUAL["fcos"], 0.25).sizes == ((2,), (4,), (8,), (16,), (32,))
    assert build_anchors("retinanet", (7, 14), 1.0).sizes == ((28, 35, 44), (56, 70, 88))


@given(st.integers(1, 64), st.floats(1e-3, 4))
def test_sides_of_fcos_survive_the_generators_rounding(stride: int, scale: float) -> None:
    side = fcos_finest(stride, scale)
    cell = build_anchors("fcos", (stride,), scale).cell_anchors[0][0]
    assert cell.tolist() == [-side / 2, -side / 2, side / 2, side / 2]
    assert side >= 2
    assert abs(side - max(2, stride * scale)) <= 1
