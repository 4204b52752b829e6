"""Feature pyramids, box outputs and class maps are found without names."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from diffkd import CWD, BoxKD, DiffKD, Distiller, FitNet, ReviewKD, list_layers, match_layers
from diffkd.distill.stages import box_outputs, class_map, common_levels, last_feature, pyramid
from diffkd.features.layers import Layer

IMAGES = torch.randn(2, 3, 32, 32)


class Segmenter(nn.Module):
    """Scores positions at a quarter of the size, and up-samples; an auxiliary head looks the same by shape."""

    def __init__(self, width: int = 8, classes: int = 5, align_corners: bool = False, scale: int = 4):
        super().__init__()
        self.align_corners, self.scale = align_corners, scale
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1))
        self.aux = nn.Conv2d(width, classes, 1)
        self.middle = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU())
        self.scorer = nn.Conv2d(2 * width, classes, 1)
        self.late_aux = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        stem = self.stem(x)
        self.aux(stem)
        scores = self.scorer(self.middle(stem))
        self.late_aux(stem)
        return F.interpolate(scores, scale_factor=self.scale, mode="bilinear", align_corners=self.align_corners)


class Detector(nn.Module):
    """Looks like torchvision's from outside: a pyramid, then heads, then boxes by image."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.backbone = Pyramid(width)
        self.head = Heads(width)

    def forward(self, x, targets=None):
        self.head(self.backbone(x))
        return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)} for _ in x]


class Pyramid(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x):
        first = self.first(x)
        return {"0": first, "p6": self.second(first)}


class Heads(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.boxes, self.scores = nn.Linear(width, 4), nn.Linear(width, 3)

    def forward(self, levels):
        cells = torch.cat([level.flatten(2).transpose(1, 2) for level in levels.values()], dim=1)
        return {"cls_logits": self.scores(cells), "bbox_regression": self.boxes(cells)}


@pytest.mark.parametrize("align_corners", [True, False])
def test_the_class_map_is_found_among_auxiliary_ones(align_corners):
    layers = list_layers(Segmenter(align_corners=align_corners), IMAGES)
    assert class_map(layers).name == "scorer"
    assert class_map(layers).feature_shape.role == "logits"
    assert last_feature(layers).name == "middle"


def test_a_segmenter_without_upsampling_scores_with_its_output():
    layers = list_layers(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)), IMAGES)
    assert class_map(layers).name == "2"
    assert last_feature(layers).name == "1"


def test_classifiers_have_neither():
    layers = list_layers(torchvision.models.squeezenet1_1(num_classes=5), torch.randn(2, 3, 64, 64))
    assert class_map(layers) is None
    assert pyramid(layers) == {}
    assert box_outputs(layers) is None


@pytest.mark.parametrize(
    ("method", "expected"),
    [(DiffKD, [("scorer", "scorer")]), (CWD, [("scorer", "scorer")]), (FitNet, [("middle", "middle")])],
)
def test_segmenters_are_paired_by_what_the_method_wants(method, expected):
    pairs = match_layers(Segmenter(8), Segmenter(16), IMAGES, method=method)
    assert [(pair.student, pair.teacher) for pair in pairs] == expected


def test_segmenters_with_other_classes_are_paired_by_their_features():
    pairs = match_layers(Segmenter(8, 5), Segmenter(16, 7), IMAGES, method=DiffKD)
    assert [(pair.student, pair.teacher) for pair in pairs] == [("middle", "middle")]


def test_class_maps_of_other_strides_are_brought_together():
    class Coarse(Segmenter):
        def __init__(self):
            super().__init__(16, scale=8)
            self.stem.append(nn.Conv2d(16, 16, 3, 2, 1))

    distiller = Distiller(Segmenter(), Coarse(), example=IMAGES)
    output, losses = distiller(IMAGES)
    assert output.shape == (2, 5, 32, 32)
    assert distiller.readers[0][0].shapes[0].size == (4, 4)
    sum(losses.values()).backward()
    assert distiller.student.scorer.weight.grad.abs().sum() > 0
    assert distiller.student.aux.weight.grad is None


def test_pyramids_are_paired_by_key():
    student, teacher = list_layers(Detector(6), IMAGES), list_layers(Detector(12), IMAGES)
    assert pyramid(student) == {"0": "backbone[0]", "p6": "backbone[p6]"}
    assert box_outputs(student) == ("head[cls_logits]", "head[bbox_regression]")
    assert student[-1].layout is None
    distiller = Distiller(Detector(6), Detector(12), example=IMAGES, method=[DiffKD, BoxKD])
    assert distiller.names == ("backbone[0]", "backbone[p6]", "boxes")
    _, losses = distiller(IMAGES)
    assert set(losses) == {*(f"{p}/{t}" for p in distiller.names[:2] for t in ("kd", "diffusion")), "boxes/kd"}
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.student.backbone.parameters())
    assert len(teacher) == len(student)


def test_levels_of_one_cell_each_are_still_a_pyramid():
    assert pyramid(list_layers(Detector(), IMAGES[..., :2, :2])) == {}
    small = Detector()
    small.backbone.first.stride = (16, 16)
    small.backbone.third = nn.Conv2d(6, 6, 3, 2, 1)
    small.backbone.forward = lambda x: {
        "0": (a := small.backbone.first(x)),
        "p6": (b := small.backbone.second(a)),
        "p7": small.backbone.third(b),
    }
    assert list(pyramid(list_layers(small, IMAGES))) == ["0", "p6", "p7"]


def test_methods_of_several_levels_get_the_whole_pyramid():
    pairs = match_layers(Detector(6), Detector(12), IMAGES, method=ReviewKD)
    assert [pair.student_names for pair in pairs] == [("backbone[0]", "backbone[p6]")]


def test_two_stage_outputs_are_known_by_their_shapes():
    class Predictor(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores, self.boxes = nn.Linear(7, 3), nn.Linear(7, 12)

        def forward(self, x):
            return self.scores(x), self.boxes(x)

    class TwoStage(nn.Module):
        def __init__(self):
            super().__init__()
            self.predictor = Predictor()

        def forward(self, x):
            self.predictor(x.flatten(1)[:, :7])
            return [{"boxes": torch.zeros(0, 4)}]

    assert box_outputs(list_layers(TwoStage(), IMAGES)) == ("predictor[0]", "predictor[1]")


def test_detectors_have_nothing_for_methods_of_logits():
    from diffkd import KD

    with pytest.raises(ValueError, match="nothing to pair for KD"):
        match_layers(Detector(), Detector(), IMAGES, method=KD)


def levels(**sizes):
    """The layers of a detector with a pyramid of such square levels."""
    elements = tuple((f"backbone[{key}]", (2, 8, size, size)) for key, size in sizes.items())
    backbone = Layer("backbone", "Pyramid", elements[0][1], None, elements=elements)
    return [backbone, Layer("output", "Detector", (2,), None, elements=elements)]


def test_levels_of_a_tiny_image_are_a_pyramid_too():
    assert list(pyramid(levels(a=4, b=2, c=1, d=1))) == ["a", "b", "c", "d"]
    assert pyramid(levels(a=1, b=1)) == pyramid(levels(a=2, b=4)) == {}


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"a": 4, "b": 2}, {"a": 4, "b": 2, "c": 1}, ["a-a", "b-b"]),
        ({"a": 4, "b": 2, "p": 1}, {"a": 8, "b": 4, "c": 2, "q": 1}, ["a-b", "b-c", "p-q"]),  # other keys
        ({"a": 4, "b": 2}, {"x": 4, "y": 2}, ["a-x", "b-y"]),  # no key in common
        ({"a": 4, "b": 2}, {"a": 5, "b": 3}, ["a-a", "b-b"]),  # nothing of the same size: resized
        ({"a": 4, "p": 1, "q": 1}, {"x": 8, "y": 4, "z": 1}, ["a-y", "p-z"]),  # each once
        ({"a": 4, "b": 2}, {"x": 5, "y": 3}, []),
    ],
)
def test_common_levels(ours, theirs, expected):
    found = common_levels(levels(**ours), levels(**theirs))
    assert [f"{a[9]}-{b[9]}" for a, b in found] == expected


class LooksAtMaps(nn.Module):
    """Has a map of its own inside, as a decoder's attention has, which is no feature of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Conv2d(8, 8, 1)

    def forward(self, queries, maps):
        return queries + self.value(maps).mean(dim=(2, 3))[:, None]


class Queries(nn.Module):
    """Answers as many queries as a grid has positions, each with class scores and a box or mask, as DETR does."""

    def __init__(self, queries: int, masks: bool) -> None:
        super().__init__()
        self.queries, self.masks = nn.Parameter(torch.randn(queries, 8)), masks
        self.trunk, self.decoder = nn.Conv2d(3, 8, 4, 4), LooksAtMaps()
        self.scores, self.boxes = nn.Linear(8, 11), nn.Linear(8, 4)

    def forward(self, images):
        maps = self.trunk(images)
        hidden = self.decoder(self.queries, maps)
        if self.masks:
            return {"scores": self.scores(hidden), "masks": torch.einsum("bqc,bchw->bqhw", hidden, maps)}
        return {"logits": self.scores(hidden), "boxes": self.boxes(hidden)}


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(("queries", "size"), [(100, (64, 64)), (108, (48, 36)), (101, (48, 36))])
@pytest.mark.parametrize("method", [FitNet, DiffKD])
def test_queries_are_no_positions(masks, queries, size, method):
    images = torch.randn(2, 3, *size)
    pairs = match_layers(Queries(queries, masks), Queries(queries, masks), images, method=method)
    assert [(pair.student, pair.teacher) for pair in pairs] == [("trunk", "trunk")]
