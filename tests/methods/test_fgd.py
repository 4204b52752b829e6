from math import ceil, floor

import pytest
import torch
import torch.nn.functional as F

from diffkd import FeatureShape
from diffkd.methods.fgd import FGD, box_weights


def weights_of(boxes, height, width, alpha, beta):
    foreground = torch.zeros(height, width, dtype=torch.float64)
    for left, top, right, bottom in boxes.tolist():
        x0, x1, y0, y1 = floor(left * width), ceil(right * width), floor(top * height), ceil(bottom * height)
        for y in range(max(0, y0), min(height, y1 + 1)):
            for x in range(max(0, x0), min(width, x1 + 1)):
                foreground[y, x] = max(foreground[y, x].item(), 1 / ((x1 - x0 + 1) * (y1 - y0 + 1)))
    background = (foreground == 0).double()
    return alpha * foreground + beta * background / max(1, background.sum().item())


def context(block, x):
    score = torch.einsum("c,bchw->bhw", block.attention.weight[0, :, 0, 0], x) + block.attention.bias
    share = score.exp() / score.exp().sum(dim=(1, 2), keepdim=True)
    pooled = torch.einsum("bchw,bhw->bc", x, share)
    first, norm, _, last = block.transform
    hidden = pooled @ first.weight.T + first.bias
    mean = hidden.mean(1, keepdim=True)
    hidden = (hidden - mean) / (((hidden - mean) ** 2).mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    return x + (hidden.clamp(min=0) @ last.weight.T + last.bias)[:, :, None, None]


@pytest.mark.parametrize(("size", "channels"), [((6, 9), (4, 4)), ((3, 4), (3, 6)), ((1, 1), (2, 4))])
def test_formula(agree, size, channels):
    height, width = size
    method = FGD(*(FeatureShape(c, size) for c in channels), relation_weight=0.3, attention_weight=0.2).double()
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter)
    student = torch.randn(3, channels[0], *size, dtype=torch.float64)
    teacher = torch.randn(3, channels[1], *size, dtype=torch.float64)
    boxes = [
        torch.tensor([[0.0, 0.1, 0.4, 0.6], [0.2, 0.2, 0.9, 0.95]]),
        torch.zeros(0, 4),
        torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
    ]

    def attention(x):
        c = x.shape[0]
        space = F.softmax((x.abs().sum(0) / c / 0.5).flatten(), 0).reshape(size) * height * width
        return space, c * F.softmax(x.abs().sum(dim=(1, 2)) / (height * width) / 0.5, 0)

    def reference(s, t):
        if channels[0] != channels[1]:
            w, b = method.student_projection.weight[:, :, 0, 0], method.student_projection.bias
            s = torch.einsum("oc,bchw->bohw", w, s) + b[:, None, None]
        total = 0.0
        for i in range(3):
            our_space, our_channels = attention(s[i])
            space, per_channel = attention(t[i])
            weight = weights_of(boxes[i], *size, 1e-3, 5e-4)
            for c in range(channels[1]):
                total = total + (weight * space * per_channel[c] * (s[i, c] - t[i, c]) ** 2).sum()
            total = total + 0.2 * ((our_space - space).abs().sum() + (our_channels - per_channel).abs().sum())
        relation = context(method.student_context, s) - context(method.teacher_context, t)
        return (total + 0.3 * (relation**2).sum()) / 3

    agree(lambda s, t: sum(method(s, t, boxes=boxes).values()), reference, student, teacher, list(method.parameters()))


def test_boxes_weigh_by_the_smallest():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]])
    weights = box_weights(boxes, 4, 8)
    assert weights.shape == (4, 8)
    assert weights[1, 2] == 1  # the point at a quarter of both sides
    assert weights[0, 0] == pytest.approx(1 / 15)
    assert (weights > 0).sum() == 15


def test_without_boxes_all_is_background():
    method = FGD(*(FeatureShape(2, (4, 5)),) * 2)
    student, teacher = torch.randn(2, 2, 2, 4, 5)
    none = method(student, teacher, boxes=[torch.zeros(0, 4)] * 2)
    assert none["kd"] > 0
    with pytest.raises(ValueError, match="boxes for each of 2 images, got 1"):
        method(student, teacher, boxes=[torch.zeros(0, 4)])
