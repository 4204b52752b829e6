"""What the examples share: images, student and teacher that come with the package."""

from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from diffkd.data import FashionSubset
from diffkd.data.classification.fashion_mnist import MEAN, STD, read_fashion_subset
from diffkd.models import load_model

EXAMPLE = FashionSubset(batch_size=128).example()  # two normalised images, (2, 1, 28, 28)


def images() -> tuple[TensorDataset, TensorDataset]:
    """Return 8,000 training and 2,000 test images (1, 28, 28), normalised as the teacher wants them, with labels."""
    train, test = (
        TensorDataset((part.images / 255 - torch.tensor(MEAN)) / torch.tensor(STD), part.labels)
        for part in read_fashion_subset()
    )
    return train, test


def teacher() -> nn.Module:
    """Return the packaged teacher."""
    weights = str(files("diffkd") / "assets" / "fashion_mnist" / "teacher.safetensors")
    return load_model("cifar/compact_resnet14", num_classes=10, in_channels=1, weights=weights)


def student() -> nn.Module:
    """Return a student a ninth its size."""
    return load_model("cifar/compact_resnet8", num_classes=10, in_channels=1)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of the images that a model classifies rightly."""
    inputs, labels = data.tensors
    scores: Tensor = model.eval()(inputs)
    return float((scores.argmax(1) == labels).float().mean())


def task_loss(output: Tensor, labels: Tensor, losses: dict[str, Tensor]) -> Tensor:
    """Return the cross entropy and the sum of the distillation losses."""
    return F.cross_entropy(output, labels) + sum(losses.values(), start=output.new_zeros(()))
