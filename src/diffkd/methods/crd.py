"""CRD: contrast the teacher's embedding of the same image with those of other images in a memory bank."""

from collections.abc import Sequence
from math import log, sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.features.shape import FeatureShape, Resizing, Want
from diffkd.methods.counter_random import random_integers
from diffkd.methods.inputs import check_labels, embed, full_precision, gathered, like_parameters, rank, unit


class CRD(nn.Module):
    """Contrastive representation distillation (Tian, Krishnan, Isola, ICLR 2020).

    Both embeddings are projected to the unit sphere. With `h = P / (P + M / n)`, `P = exp(u . v / tau) / Z`, n samples
    and M negatives, the loss is `-log h(positive) - sum log(1 - h(negative))`, averaged over the batch: the student
    against the memory of the teacher, plus the teacher against the memory of the student. Z is fixed at the first step,
    so that P averages 1 / n. A memory holds a running average of every sample's embedding, and is updated after the
    loss.

    Negatives are drawn without replacement from the samples of other classes, as in the authors' default: each step
    shuffles all samples, and each image takes a contiguous part of that order from a random offset. If there are fewer
    than M, they are repeated, as there. `diffkd fit` passes the classes of the samples; without them, in your own
    training loop, they are collected from the batches, and a sample not seen yet counts as one of another class. The
    memories, classes, Z and the step are buffers, and the step seeds the draws, so that a resumed run gives the same
    results as an uninterrupted one. In distributed training, every rank gathers the batches of all ranks (of equal
    size) and holds the same memories; they need not be broadcast.

    All defaults are those of the authors' code (RepDistiller) for CIFAR-100.

    Args:
        student: the student's shape; maps are averaged over positions.
        teacher: the teacher's shape.
        samples: n, number of training samples, whose indices are 0..n-1; None: `diffkd fit` sets the number of the
            data; in your own training loop it is 50000, as for CIFAR-100.
        sample_labels: the class of each training sample, (n,); `diffkd fit` sets it. None: collected from the batches.
        negatives: M.
        dim: length of the projected embeddings.
        temperature: tau > 0.
        momentum: share of the old entry when a memory is updated.
        weight: factor of the loss.

    Raises:
        ValueError: if `samples` is below 2, `negatives` below 1 or `temperature` not positive.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature"})
    resizes: ClassVar[Resizing] = "none"
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    needs: ClassVar[tuple[str, ...]] = ("indices", "labels")
    student_memory: Tensor
    teacher_memory: Tensor
    classes: Tensor
    log_normalizers: Tensor
    step: Tensor

    def __init__(
        self,
        student: FeatureShape,
        teacher: FeatureShape,
        *,
        samples: int | None = None,
        sample_labels: Sequence[int] | Tensor | None = None,
        negatives: int = 16_384,
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        weight: float = 0.8,
    ) -> None:
        super().__init__()
        known = None if sample_labels is None else torch.as_tensor(sample_labels, dtype=torch.int64)
        if samples is None:
            samples = 50_000 if known is None else len(known)
        if samples < 2 or negatives < 1 or temperature <= 0:
            raise ValueError(
                f"samples must be 2 or more, negatives 1 or more and temperature above 0, got {samples}, {negatives}, "
                f"{temperature}"
            )
        if known is not None and known.shape != (samples,):
            raise ValueError(f"CRD has {samples} samples, but got labels of {tuple(known.shape)}; give one for each")
        # So many extra candidates guarantee enough samples of other classes.
        self.spare = negatives if known is None else int(known.bincount().max())
        self.samples, self.negatives, self.temperature = samples, negatives, temperature
        self.momentum, self.weight = momentum, weight
        self.student_projection = nn.Linear(student.channels, dim)
        self.teacher_projection = nn.Linear(teacher.channels, dim)
        # The same on every rank, whatever its seed.
        generator = torch.Generator().manual_seed(0)
        bound = sqrt(3 / dim)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, (2 * torch.rand(samples, dim, generator=generator) - 1) * bound)
        self.register_buffer("classes", torch.full((samples,), -1) if known is None else known.clone())
        self.register_buffer("log_normalizers", torch.zeros(2))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, *, indices: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compare the batch with the memories, then update them (in training mode).

        Args:
            student: (B, Cs, H, W) or (B, Cs).
            teacher: (B, Ct, H, W) or (B, Ct).
            indices: (B,) int64 indices of the training samples, in 0..samples-1.
            labels: (B,) int64, their classes.

        Returns:
            {"kd": loss}.

        Raises:
            ValueError: if `indices` or `labels` have another shape or are no whole numbers.
        """
        check_labels("CRD", labels, (len(student),))
        if indices.is_floating_point() or indices.shape != labels.shape:
            raise ValueError(f"CRD needs one index for each image, got {indices.dtype} of {tuple(indices.shape)}")
        ours = self._project(self.student_projection, student)
        theirs = self._project(self.teacher_projection, teacher.detach())
        if self.training:
            _write(self.classes, gathered(indices), gathered(labels))
        drawn = other_class_samples(self.classes, labels, self.negatives, self.step, rank(), self.spare)
        candidates = torch.cat([indices[:, None], drawn], dim=1)  # (B, 1 + M), the positive first
        with full_precision(student):
            loss = self._contrast(ours, self.teacher_memory, candidates, 0)
            loss = loss + self._contrast(theirs, self.student_memory, candidates, 1)
        if self.training:
            self._remember(self.student_memory, gathered(indices), gathered(ours))
            self._remember(self.teacher_memory, gathered(indices), gathered(theirs))
            self.step += 1
        return {"kd": self.weight * loss}

    def _project(self, projection: nn.Linear, feature: Tensor) -> Tensor:
        pooled = embed(feature)
        with full_precision(pooled):
            return unit(at_least_float32(projection(like_parameters(pooled, projection))))

    def _contrast(self, embeddings: Tensor, memory: Tensor, candidates: Tensor, side: int) -> Tensor:
        # A copy, since the memory changes before the backward pass. The scores of all samples are far smaller than the
        # (B, 1 + M, dim) entries of the drawn ones.
        scores = embeddings / self.temperature @ memory.to(embeddings.dtype, copy=True).T
        scores = scores.gather(1, candidates)
        first = scores.detach().logsumexp(dim=(0, 1)) - log(scores.numel()) + log(self.samples)
        if self.training:
            each = gathered(first[None])
            first = each.logsumexp(dim=0) - log(len(each))
        log_z = torch.where(self.step == 0, first, self.log_normalizers[side].to(first.dtype))
        if self.training:
            self.log_normalizers[side] = log_z
        log_p = scores - log_z
        noise = self.negatives / self.samples
        log_sum = torch.logaddexp(log_p, torch.full_like(log_p[:1, :1], log(noise + 1e-7)))
        positive = log_p[:, 0] - log_sum[:, 0]
        negative = log(noise) - log_sum[:, 1:]
        return -(positive.sum() + negative.sum()) / len(embeddings)

    @torch.no_grad()
    def _remember(self, memory: Tensor, indices: Tensor, embeddings: Tensor) -> None:
        old = memory[indices].to(embeddings.dtype)
        _write(memory, indices, unit(self.momentum * old + (1 - self.momentum) * embeddings))


def other_class_samples(
    classes: Tensor, labels: Tensor, count: int, step: Tensor, stream: int = 0, spare: int | None = None
) -> Tensor:
    """Draw different samples of other classes, uniformly.

    Args:
        classes: (n,) class of every sample, -1 if unknown.
        labels: (B,) classes to avoid.
        count: number of draws for each of them. If there are fewer samples of other classes, they are repeated.
        step: scalar int64 that seeds the draws (:func:`~diffkd.methods.counter_random.random_integers`).
        stream: index of the independent random sequence.
        spare: number of extra candidates, so that enough of them are of other classes: the size of the largest class
            suffices. None: all samples.

    Returns:
        (B, count) indices into `classes`. If all samples are of the class, so are those drawn.
    """
    total = len(classes)
    width = total if spare is None else min(total, count + spare)
    order = random_integers(step, (total,), 2**31 - 1, 2 * stream).argsort(stable=True)
    start = random_integers(step, (len(labels), 1), total, 2 * stream + 1)
    drawn = order[(start + torch.arange(width, device=classes.device)) % total]  # (B, width), all different
    other = classes[drawn] != labels[:, None]
    first = other.int().argsort(dim=1, descending=True, stable=True)
    enough = other.sum(dim=1, keepdim=True)
    place = torch.arange(count, device=classes.device) % enough.masked_fill(enough == 0, width)
    return drawn.gather(1, first.gather(1, place))


def _write(memory: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write rows in place. For duplicate indices the first row is written: on a GPU the order is undefined."""
    first = (indices[:, None] == indices).int().argmax(dim=1)
    memory.index_copy_(0, indices, values[first].to(memory.dtype))
