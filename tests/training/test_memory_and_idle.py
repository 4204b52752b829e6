"""What a training says where memory or gradients are missing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.task_of_data import build_task
from diffkd.training.lightning_module import Training
from diffkd.training.optimization import Schedule


class Greedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, images):
        if not self.training:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return self.used(images)


def training(task):
    facts = DataFacts(2, 3, (8, 8), (0,) * 3, (1,) * 3, ("a", "b"), torch.zeros(2, 3, 8, 8), task=task)
    model = Greedy()
    return Training(model, build_task(facts, models=[model]), optimizer=torch.optim.SGD, schedule=Schedule(), epochs=1)


@pytest.mark.parametrize(
    ("task", "option"), [("segmentation", r"segmentation\.window"), ("classification", "give --data")]
)
def test_measuring_out_of_memory_names_what_helps(task, option):
    made = training(task).eval()
    made._meters = {"": made.task.meter(torch.device("cpu"))}
    batch = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8).long(), torch.arange(2))
    with pytest.raises(
        RuntimeError, match=rf"out of memory while measuring a batch of 2x3x8x8.*{option}.*val_batch_size"
    ):
        made.validation_step(batch, 0)


def test_parameters_without_a_gradient_are_named_where_processes_wait_for_them(monkeypatch):
    made = training("segmentation")
    made.model(torch.ones(1, 3, 8, 8)).sum().backward()
    made.on_after_backward()
    monkeypatch.setattr("diffkd.training.lightning_module.several_processes", lambda: True)
    made._trainer = SimpleNamespace(strategy=None, global_step=0)
    monkeypatch.setattr(type(made), "global_step", 0)
    monkeypatch.setattr(type(made), "trainer", made._trainer)
    with pytest.raises(ValueError, match=r"model\.idle\.weight, model\.idle\.bias got no gradient.*requires_grad_"):
        made.on_after_backward()
