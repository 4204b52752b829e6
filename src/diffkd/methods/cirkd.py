"""CIRKD: match the similarities of pixels to those of other images, in the batch and in memory queues."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.diffusion.modules import BatchNorm
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.counter_random import random_integers
from diffkd.methods.inputs import (
    check_label_maps,
    check_same_grid,
    full_precision,
    gathered,
    labels_on_grid,
    like_parameters,
    rank,
    require_maps,
    unit,
)


class ClassQueue(nn.Module):
    """Keeps the last `size` embeddings of every class, in buffers.

    No value is copied to the host: invalid entries are written to a spare row at the end.

    Args:
        classes: number of classes.
        size: entries for each.
        dim: length of an embedding.
    """

    entries: Tensor
    count: Tensor

    def __init__(self, classes: int, size: int, dim: int) -> None:
        super().__init__()
        if classes < 1 or size < 1:
            raise ValueError(f"a memory needs at least 1 class and 1 entry, got {classes} and {size}")
        self.classes, self.size = classes, size
        self.register_buffer("entries", torch.zeros(classes * size + 1, dim))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def push(self, candidates: Tensor, valid: Tensor) -> None:
        """Store candidates in order, over the oldest entries.

        Args:
            candidates: (classes, n, dim).
            valid: (classes, n) bool, which of them to store.

        Raises:
            ValueError: if n is above `size`.
        """
        if candidates.shape[1] > self.size:
            raise ValueError(
                f"a batch may bring {candidates.shape[1]} entries of a class, more than the memory of {self.size} "
                "holds; make the memory larger"
            )
        place = (self.count[:, None] + valid.cumsum(dim=1) - 1) % self.size
        start = torch.arange(self.classes, device=place.device)[:, None] * self.size
        row = torch.where(valid, start + place, self.classes * self.size)
        self.entries.index_copy_(0, row.flatten(), candidates.flatten(0, 1).to(self.entries.dtype))
        self.entries[-1] = 0
        self.count += valid.sum(dim=1)

    def draw(self, number: int, step: Tensor, stream: int = 0) -> tuple[Tensor, Tensor]:
        """Draw entries of every class, uniformly and with replacement.

        Args:
            number: how many of each class.
            step: scalar int64 that seeds the draws.
            stream: index of the independent random sequence.

        Returns:
            (classes * number, dim) entries, and (classes * number,) bool, False for classes without entries.
        """
        filled = self.count.clamp(max=self.size)[:, None]
        place = random_integers(step, (self.classes, number), filled.clamp_min(1), stream)
        start = torch.arange(self.classes, device=place.device)[:, None] * self.size
        exists = (filled > 0).expand(-1, number)
        return self.entries[(start + place).flatten()], exists.flatten()


class CIRKD(nn.Module):
    """Cross-image relational distillation for segmentation (Yang, Zhou, An, Jiang, Xu, Zhang, CVPR 2022).

    All three losses compare, by the divergence of their softmax, the cosine similarities of a pixel: "kd" to the pixels
    of every image of the batch; "pixel" to pixels, and "region" to class averages, of the teacher on earlier images,
    kept in a queue for each class. In the latter two the student is projected to the teacher's channels, and only
    labelled pixels count. The queues and the step are buffers, and the step seeds the draws, so that a resumed run
    gives the same results as an uninterrupted one. In distributed training every rank stores the embeddings of all
    ranks; their batches must be of equal size.

    All defaults are those of the authors' code for Cityscapes. Unlike that code, only stored entries are drawn from
    the queues, and the queue of a class holds pixels of that class alone: with the authors' indexing about a quarter
    of them are. The queues take 4 * classes * (pixel_memory + region_memory) * Ct bytes.

    Args:
        student: the student's shape, a map of features.
        teacher: the teacher's shape, a map of features.
        classes: number of classes; labels outside of 0..classes-1 are ignored. None: `diffkd fit` sets the number of
            the data; in your own training loop it is 19, as for Cityscapes.
        pixel_memory: pixels kept for each class.
        region_memory: regions kept for each class.
        pixel_contrast: pixels drawn at a step, spread over the classes.
        region_contrast: regions drawn at a step, spread over the classes.
        pixels_per_image: pixels of each class that are stored per image.
        temperature: of the similarities.
        pool: average the maps of "kd" over squares of this size, which saves memory: that loss takes (B * H * W)^2
            numbers.
        batch_weight: factor of "kd".
        pixel_weight: factor of "pixel".
        region_weight: factor of "region".
        weight: factor of all losses.

    Raises:
        ValueError: if one of them is a vector, or `temperature` or a size is not positive.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature"})
    tasks: ClassVar[frozenset[str]] = frozenset({"segmentation"})
    needs: ClassVar[tuple[str, ...]] = ("labels",)
    step: Tensor

    def __init__(
        self,
        student: FeatureShape,
        teacher: FeatureShape,
        *,
        classes: int | None = None,
        pixel_memory: int = 20_000,
        region_memory: int = 2_000,
        pixel_contrast: int = 4_096,
        region_contrast: int = 1_024,
        pixels_per_image: int = 16,
        temperature: float = 0.1,
        pool: int = 1,
        batch_weight: float = 1.0,
        pixel_weight: float = 0.1,
        region_weight: float = 0.1,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        require_maps("CIRKD", student, teacher)
        classes = 19 if classes is None else classes
        if temperature <= 0 or min(pixel_contrast, region_contrast, pixels_per_image, pool) < 1:
            raise ValueError(
                "temperature must be above 0, and pixel_contrast, region_contrast, pixels_per_image and pool at least "
                f"1, got {temperature}, {pixel_contrast}, {region_contrast}, {pixels_per_image} and {pool}"
            )
        dim = teacher.channels
        self.student_projection = nn.Sequential(
            *(nn.Conv2d(student.channels, dim, 1, bias=False), BatchNorm(dim), nn.ReLU()),
            nn.Conv2d(dim, dim, 1, bias=False),
        )
        self.pixels = ClassQueue(classes, pixel_memory, dim)
        self.regions = ClassQueue(classes, region_memory, dim)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.classes, self.pixels_per_image = classes, pixels_per_image
        self.drawn_pixels, self.drawn_regions = pixel_contrast // classes + 1, region_contrast // classes + 1
        self.temperature, self.pool, self.weight = temperature, pool, weight
        self.batch_weight, self.pixel_weight, self.region_weight = batch_weight, pixel_weight, region_weight

    def forward(self, student: Tensor, teacher: Tensor, *, labels: Tensor) -> dict[str, Tensor]:
        """Compare the maps, and store the teacher's (in training mode).

        Args:
            student: (B, Cs, H, W).
            teacher: (B, Ct, H, W).
            labels: (B, H', W') int64 classes of any resolution.

        Returns:
            {"kd": loss, "pixel": loss, "region": loss}.

        Raises:
            ValueError: if sizes differ, `labels` are no class maps, or a batch has more entries than a queue holds.
        """
        check_same_grid(student, teacher)
        check_label_maps("CIRKD", labels, len(student))
        teacher = teacher.detach()
        projected = self.student_projection(like_parameters(student, self.student_projection))
        with full_precision(student):
            cells = labels_on_grid(labels, *teacher.shape[2:]).flatten(1)  # (B, H * W)
            ours, theirs = (unit(at_least_float32(x)).flatten(2).transpose(1, 2) for x in (projected, teacher))
            if self.training:
                self._store(theirs, cells)
            known = ((cells >= 0) & (cells < self.classes)).flatten()
            ours, theirs = ours.flatten(0, 1), theirs.flatten(0, 1)  # (B * H * W, Ct)
            stream = 3 * rank()
            pixels = self.pixels.draw(self.drawn_pixels, self.step, stream)
            regions = self.regions.draw(self.drawn_regions, self.step, stream + 1)
            losses = {
                "kd": self.batch_weight * self._across_images(student, teacher),
                "pixel": self.pixel_weight * self._to_memory(ours, theirs, known, *pixels),
                "region": self.region_weight * self._to_memory(ours, theirs, known, *regions),
            }
        if self.training:
            self.step += 1
        return {term: self.weight * loss for term, loss in losses.items()}

    def _across_images(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (
            unit(F.avg_pool2d(at_least_float32(x), self.pool, ceil_mode=True)).flatten(2) for x in (student, teacher)
        )
        losses = []
        for image in range(len(ours)):  # one image against all, (B, H * W, H * W) at a time
            our_logits, their_logits = (x[image].T @ x / self.temperature for x in (ours, theirs))
            losses.append(divergence(our_logits, their_logits).mean())
        return torch.stack(losses).mean()

    def _to_memory(self, ours: Tensor, theirs: Tensor, known: Tensor, entries: Tensor, exists: Tensor) -> Tensor:
        entries = entries.to(ours.dtype).T
        # Far below all others, but finite: the difference of two infinities is NaN.
        bias = torch.where(exists, 0.0, -1e4).to(ours.dtype)
        losses = divergence(*(x @ entries / self.temperature + bias for x in (ours, theirs)))
        return (losses * known).sum() / known.sum().clamp_min(1)

    @torch.no_grad()
    def _store(self, embeddings: Tensor, cells: Tensor) -> None:
        """Store random pixels and the average of every class of every image; embeddings (B, N, Ct), cells (B, N)."""
        batch, positions = cells.shape
        of_class = cells[:, None] == torch.arange(self.classes, device=cells.device)[:, None]  # (B, classes, N)
        share = of_class.to(embeddings.dtype)
        average = unit(share @ embeddings, dim=2)[:, :, None]  # (B, classes, 1, Ct)
        self.regions.push(*_by_class(average, of_class.any(dim=2, keepdim=True)))

        key = random_integers(self.step, (batch, 1, positions), 2**31 - 1, 3 * rank() + 2)
        best, chosen = torch.where(of_class, key, -1).topk(min(self.pixels_per_image, positions), dim=2)
        picked = embeddings[torch.arange(batch, device=cells.device)[:, None, None], chosen]
        self.pixels.push(*_by_class(picked, best >= 0))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) along the last dimension."""
    ours, theirs = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return (theirs.exp() * (theirs - ours)).sum(dim=-1)


def _by_class(entries: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Gather (B, classes, n, dim) and (B, classes, n) of all ranks, and move the class dimension to the front."""
    entries, valid = (gathered(x).transpose(0, 1).flatten(1, 2) for x in (entries, valid))
    return entries, valid
