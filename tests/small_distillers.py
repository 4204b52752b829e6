"""A small distiller, and a step of it."""

import torch
from small_nets import ConvNet

from diffkd import Distiller

IMAGES = torch.randn(4, 3, 16, 16)


def distil(student=None, teacher=None, pairs="auto", **options):
    options.setdefault("example", IMAGES)
    student = ConvNet(4) if student is None else student
    return Distiller(student, ConvNet(12) if teacher is None else teacher, pairs, **options)


def backward(distiller, *inputs, **context):
    output, losses = distiller(*(inputs or (IMAGES,)), **context)
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    return output, losses
