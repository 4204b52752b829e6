"""Distances between a student's and a teacher's tensor.

All take `(student, teacher)` of equal shape, (B, C) or (B, C, H, W), compute in float32 or wider for any dtype, and
return a scalar. Classes or channels are dimension 1.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, float32, promote_types

Distance = Callable[[Tensor, Tensor], Tensor]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32, or unchanged if wider: half precision is too coarse for distances."""
    return tensor.to(promote_types(tensor.dtype, float32))


def check_several_classes(who: str, classes: int) -> None:
    """Raise ValueError if there is only one class: its softmax is always 1, without gradient."""
    if classes < 2:
        raise ValueError(
            f"{who} compares softmax distributions and needs 2 or more classes, got {classes}: over a single one they "
            "are constant, and nothing would be learned; let both models score two classes (of one logit z, "
            "torch.cat([torch.zeros_like(z), z], dim=1) does), take a squared error (DiffKD(distance='mse')), or "
            "distil features (FitNet or DiffKD on a feature pair)"
        )


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error over all entries (Eq. 7 of the DiffKD paper, for features)."""
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    # Older PyTorch (2.11) has no gradient for mixed dtypes.
    common = promote_types(student.dtype, teacher.dtype)
    return F.mse_loss(student.to(common), teacher.to(common))


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the Kullback-Leibler divergence of softened class distributions.

    `tau^2 / B * sum KL(softmax(teacher / tau) || softmax(student / tau))`, from Hinton, Vinyals, Dean, *Distilling the
    Knowledge in a Neural Network*, 2015. On maps the sum runs over positions too. The teacher gets no gradient.

    Args:
        student: (B, K) or (B, K, H, W) logits.
        teacher: logits of the same shape.
        temperature: tau > 0.

    Returns:
        A scalar; 0 if both distributions are equal.

    Raises:
        ValueError: if there is a single class.
    """
    check_several_classes("the divergence", student.shape[1])
    log_student = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    log_teacher = F.log_softmax(at_least_float32(teacher.detach()) / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def kl_by_position(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return :func:`kl_divergence`, for (B, K, H, W) also averaged over positions.

    Liu, Chen, Liu, Qin, Luo, Wang, *Structured Knowledge Distillation for Semantic Segmentation*, CVPR 2019, Eq. 1.
    """
    return kl_divergence(student, teacher, temperature) / student[0, 0].numel()


def dist(
    student: Tensor,
    teacher: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    pool_positions: bool = False,
) -> Tensor:
    """Return DIST: one minus Pearson's correlation of the class scores, within each sample and within each class.

    Huang, You, Wang, Qian, Xu, *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022, Eq. 8 to 10.

    Args:
        student: (B, K) or (B, K, H, W) logits.
        teacher: logits of the same shape.
        beta: weight of the relation between classes (per sample).
        gamma: weight of the relation between samples (per class).
        temperature: tau > 0 of both softmaxes; the loss is scaled by tau^2.
        pool_positions: on maps, correlate over all B * H * W positions of a class, for dense prediction; otherwise
            over the B samples at each position, as in the authors' classification code.

    Returns:
        A scalar in [0, 2 (beta + gamma) tau^2].

    Raises:
        ValueError: if there is a single class.
    """
    check_several_classes("DIST", student.shape[1])
    student, teacher = ((at_least_float32(logits) / temperature).softmax(dim=1) for logits in (student, teacher))
    if pool_positions:
        student, teacher = (scores.movedim(1, -1).flatten(0, -2) for scores in (student, teacher))  # (B * H * W, K)
    inter = 1 - pearson(student, teacher).mean()
    intra = 1 - pearson(student.transpose(0, 1), teacher.transpose(0, 1)).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def pearson(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Return Pearson's correlation along dimension 1 of (N, M, ...) tensors, (N, ...); 0 if one is constant."""
    a = a - a.mean(dim=1, keepdim=True)
    b = b - b.mean(dim=1, keepdim=True)
    norms: Tensor = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(dim=1) / (norms + eps)


def attention_mse(student: Tensor, teacher: Tensor, temperature: float = 0.5) -> Tensor:
    """Return the squared error weighted by the teacher's attention, the DiffKD paper's distance for detectors (dagger).

    `mean(A_s A_c (s - t)^2)` with the teacher's attention over positions and over channels, each 1 on average (Yang et
    al., *Focal and Global Knowledge Distillation for Detectors*, CVPR 2022, Eq. 3 to 6).

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W), without gradient.
        temperature: of both attentions.

    Returns:
        A scalar; the mean squared error if the teacher is constant.
    """
    ours, theirs = at_least_float32(student), at_least_float32(teacher.detach())
    space, channels = attentions(theirs, temperature)
    return (space[:, None] * channels[:, :, None, None] * (ours - theirs).square()).mean()


def attentions(feature: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the attention of (B, C, H, W) over positions (B, H, W) and over channels (B, C), each 1 on average."""
    strength = feature.abs()
    space = (strength.mean(dim=1).flatten(1) / temperature).softmax(dim=1)
    channels = (strength.mean(dim=(2, 3)) / temperature).softmax(dim=1)
    batch, count, height, width = feature.shape
    return height * width * space.reshape(batch, height, width), count * channels


def distance_by_name(name: str, temperature: float = 1.0, *, class_map: bool = False) -> Distance:
    """Return the distance called "mse", "kl", "dist" or "attention_mse".

    Args:
        name: of the distance.
        temperature: of those between distributions.
        class_map: whether it compares class maps, (B, C, H, W), with a distribution at each position.

    Raises:
        ValueError: if there is no such distance.
    """
    known: dict[str, Distance] = {
        "mse": mse,
        "kl": partial(kl_by_position if class_map else kl_divergence, temperature=temperature),
        "dist": partial(dist, temperature=temperature, pool_positions=class_map),
        "attention_mse": attention_mse,
    }
    if name not in known:
        raise ValueError(f"distance must be one of {', '.join(known)} or a callable, got {name!r}")
    return known[name]
