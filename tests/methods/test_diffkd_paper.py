"""The paper's variant trains at the learning rate that the paper gives for CIFAR (Table 1: SGD 0.05, momentum 0.9)."""

import torch
from torch import nn

from diffkd import DiffKD


def test_it_trains_at_the_papers_rate():
    teacher = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
    student = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    method = DiffKD(8, 12, variant="paper")
    optimizer = torch.optim.SGD([*student.parameters(), *method.parameters()], 0.05, momentum=0.9, weight_decay=5e-4)
    losses = []
    for _ in range(30):
        images = torch.randn(16, 3, 8, 8)
        with torch.no_grad():
            target = teacher(images)
        loss = torch.stack(list(method(student(images), target).losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 10 * losses[0]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_both_variants_take_the_mean_of_the_squared_error():
    assert DiffKD(6, 8, variant="paper").error == DiffKD(6, 8).error == "mean"
    assert DiffKD(6, 8, variant="paper", error="sum").error == "sum"
