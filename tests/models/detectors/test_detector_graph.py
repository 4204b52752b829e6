"""Detectors as graphs: the same detections as torchvision's own code, without its choices by number of candidates."""

import pytest
import torch
from torch import nn

from diffkd.export.program_file import detection_difference
from diffkd.models import load_detector
from diffkd.models.detectors.onnx_graph import DetectorGraph, clip, large, suppress


def detector(family, **options):
    torch.manual_seed(1)
    values = {"num_classes": 3, "min_size": (48,), "max_size": 80, "fpn_channels": 64} | options
    model = load_detector(f"{family}/mobilenet_v3_small", **values).eval()
    if family == "fasterrcnn":
        model.rpn._post_nms_top_n["testing"] = 60  # fewer than there are, and quicker than 1000
    return model


def thresholds(model):
    return model.roi_heads if hasattr(model, "roi_heads") else model


@pytest.mark.parametrize("family", ["retinanet", "fcos", "fasterrcnn"])
@pytest.mark.parametrize("size", [(48, 64), (31, 90)])
@torch.no_grad()
def test_the_detections_are_those_of_torchvision(family, size):
    model = detector(family)
    heads = thresholds(model)
    images = torch.rand(1, 3, *size)
    heads.score_thresh = 0.0
    everything = model([images[0]])[0]
    assert len(everything["scores"]) > 10
    for heads.score_thresh in (0.0, float(everything["scores"][5]), 0.9999):
        expected = model([images[0]])[0]
        found = DetectorGraph(model).eval()(images)
        expected = [expected[name] for name in ("boxes", "scores", "labels")]
        assert [value.dtype for value in found] == [value.dtype for value in expected]
        assert detection_difference(expected, found, heads.detections_per_img) < 1e-5
    assert [tuple(value.shape) for value in found] == [(0, 4), (0,), (0,)]


@torch.no_grad()
def test_few_are_kept_where_few_are_asked_for():
    model = detector("fcos")
    model.score_thresh, model.detections_per_img = 0.0, 3
    boxes, scores, labels = DetectorGraph(model)(torch.rand(1, 3, 50, 50))
    assert (len(boxes), len(scores), len(labels)) == (3, 3, 3)
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


def test_other_detectors_are_refused():
    with pytest.raises(ValueError, match=r"Linear cannot be exported as a graph.*\.safetensors"):
        DetectorGraph(nn.Linear(1, 1))


def test_doubles_of_one_class_are_suppressed_and_those_of_another_are_not():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10]])
    scores = torch.tensor([0.8, 0.9, 0.7])
    assert suppress(boxes, scores, torch.tensor([1, 1, 2]), (10, 12), 0.5).tolist() == [1, 2]
    assert suppress(boxes, scores, torch.tensor([1, 1, 2]), (10, 12), 0.95).tolist() == [1, 0, 2]
    assert suppress(boxes[:0], scores[:0], torch.zeros(0, dtype=torch.int64), (10, 12), 0.5).tolist() == []


def test_boxes_are_cut_and_judged():
    boxes = torch.tensor([[-3.0, 2, 30, 4], [5, -1, 5, 99]])
    assert clip(boxes, (8, 20)).tolist() == [[0, 2, 20, 4], [5, 0, 5, 8]]
    assert large(boxes, 1.0).tolist() == [True, False]
