"""Helpers of the methods: check, align, pool and normalise features; gather over ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.diffusion.modules import pointwise
from diffkd.features.forward import first_parameter
from diffkd.features.shape import FeatureShape


def require_maps(method: str, *shapes: FeatureShape) -> None:
    """Raise ValueError unless all `shapes` are maps; `method` is named in the message."""
    for shape in shapes:
        if not shape.is_map:
            raise ValueError(
                f"{method} compares positions and needs maps (channels x height x width), got a vector of {shape}; "
                "pair layers before the pooling, or take a method for vectors"
            )


def check_same_grid(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both maps, (B, C, H, W), have the same batch and spatial size."""
    if student.ndim != 4 or student.shape[::2] != teacher.shape[::2] or student.shape[3:] != teacher.shape[3:]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be maps (B, C, H, W) of the same "
            "batch and spatial size; resize one of them first, or let Distiller do it"
        )


def check_labels(method: str, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `labels` are whole numbers of `shape`."""
    if labels.is_floating_point() or tuple(labels.shape) != shape:
        raise ValueError(
            f"{method} needs one class for each image or position, whole numbers of shape {shape}, got "
            f"{labels.dtype} of {tuple(labels.shape)}; mixed labels (Mixup, CutMix) do not fit, switch them off"
        )


def check_label_maps(method: str, labels: Tensor, batch: int) -> None:
    """Raise ValueError unless `labels` are whole numbers of shape (B, H, W), of any resolution."""
    if labels.is_floating_point() or labels.ndim != 3 or len(labels) != batch:
        raise ValueError(
            f"{method} needs the class of every pixel, whole numbers of shape ({batch}, H, W), got {labels.dtype} of "
            f"{tuple(labels.shape)}; where whole images have classes, take a method that needs no labels"
        )


def align(student: FeatureShape, teacher: FeatureShape) -> nn.Module:
    """Return a linear map from the student's channels to the teacher's; the identity where they agree."""
    if student.channels == teacher.channels:
        return nn.Identity()
    return pointwise(student.channels, teacher.channels, teacher.is_map)


def like_parameters(tensor: Tensor, module: nn.Module) -> Tensor:
    """Return `tensor` in the dtype of the parameters of `module`; unchanged if it has none."""
    parameter = first_parameter(module)
    return tensor if parameter is None else tensor.to(parameter.dtype)


def embed(feature: Tensor) -> Tensor:
    """Return the embedding (B, C), in float32 or wider: a vector (B, C) itself, the mean of a map (B, C, H, W)."""
    feature = at_least_float32(feature)
    return feature.flatten(2).mean(dim=2) if feature.ndim > 2 else feature


def unit(x: Tensor, dim: int = 1) -> Tensor:
    """Return `x` divided by its Euclidean norm along `dim`. Zero stays zero, with a finite gradient."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x.div(norm.masked_fill(norm == 0, 1))


def full_precision(tensor: Tensor) -> torch.autocast:
    """Return a context that disables autocast on the device of `tensor`: products of float32 stay float32."""
    return torch.autocast(tensor.device.type, enabled=False)


def labels_on_grid(labels: Tensor, height: int, width: int) -> Tensor:
    """Resize class maps (B, H, W) of integers to (B, height, width) by nearest neighbour."""
    return F.interpolate(labels[:, None].float(), (height, width), mode="nearest")[:, 0].long()


def rank() -> int:
    """Return the rank of this process; 0 outside of distributed training."""
    return distributed.get_rank() if _is_distributed() else 0


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, of equal shape, concatenated along dimension 0."""
    if not _is_distributed() or distributed.get_world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def averaged(tensor: Tensor) -> Tensor:
    """Return the mean over all ranks."""
    return gathered(tensor[None]).mean(dim=0)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
