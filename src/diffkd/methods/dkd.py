"""DKD: distil the target class and the other classes with separate weights."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.inputs import check_label_maps, check_labels, labels_on_grid
from diffkd.methods.kd import check_logits, standardize


class DKD(nn.Module):
    """Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang, CVPR 2022), on logits.

    `tau^2 / B * sum(alpha * TCKD + beta * NCKD)`, with :func:`decoupled` at temperature tau.

    The defaults are those of the authors' code for CIFAR-100, which takes a beta of 2 for ResNet-56 to ResNet-20 and
    of 6 for WRN-40-2 to WRN-40-1, and warms the loss up linearly over 20 epochs. On ImageNet: tau 1, beta 0.5 for
    ResNet-34 to ResNet-18 and 2 for ResNet-50 to MobileNetV1.

    Args:
        student: the student's shape.
        teacher: the teacher's shape, with the same number of classes.
        alpha: weight of the target class.
        beta: weight of the other classes.
        temperature: tau > 0.
        standardize: take the logits' Z-scores first (:func:`~diffkd.methods.kd.standardize`).
        weight: factor of the loss.

    Raises:
        ValueError: if the class counts differ or are below 2, or `temperature` is not positive.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"logits"})
    least_classes: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("labels",)

    def __init__(
        self,
        student: FeatureShape,
        teacher: FeatureShape,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        standardize: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_logits("DKD", student, teacher, temperature)
        self.alpha, self.beta, self.temperature, self.weight = alpha, beta, temperature, weight
        self.standardize = standardize

    def forward(self, student: Tensor, teacher: Tensor, *, labels: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for logits (B, K) and labels (B,), or (B, K, H, W) and (B, H', W') of any resolution.

        Labels outside of 0..K-1 are ignored. On maps the loss is averaged over positions too, as in KD.
        """
        batch, classes = student.shape[:2]
        if student.ndim == 4:
            check_label_maps("DKD", labels, batch)
            labels = labels_on_grid(labels, *student.shape[2:])
        else:
            check_labels("DKD", labels, (batch,))
        teacher = teacher.detach()
        if self.standardize:
            student, teacher = standardize(student), standardize(teacher)
        student, teacher = (x.movedim(1, -1).reshape(-1, classes) for x in (student, teacher))
        labels = labels.reshape(-1)
        known = (labels >= 0) & (labels < classes)
        target, others = decoupled(student, teacher, labels.clamp(0, classes - 1), self.temperature)
        losses = (self.alpha * target + self.beta * others) * known
        return {"kd": self.weight * self.temperature**2 * losses.mean()}


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the two parts of the divergence of two class distributions.

    TCKD is the divergence of (p_t, 1 - p_t), target class against the rest; NCKD that of the other classes,
    renormalised. `KL(teacher || student) = TCKD + (1 - p_t of the teacher) * NCKD`.

    Args:
        student: (N, K) logits.
        teacher: (N, K) logits.
        labels: (N,) target classes in 0..K-1.
        temperature: tau > 0.

    Returns:
        TCKD and NCKD of each sample, (N,) each, in float32 or wider.
    """
    student, teacher = (at_least_float32(logits) / temperature for logits in (student, teacher))
    target = labels[:, None]
    column = torch.arange(student.shape[1] - 1, device=student.device)
    rest = column + (column >= target)  # (N, K - 1): all classes except the target

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        others = logits.gather(1, rest)
        both = torch.cat([logits.gather(1, target), others.logsumexp(dim=1, keepdim=True)], dim=1)
        return both.log_softmax(dim=1), others.log_softmax(dim=1)

    parts = zip(split(student), split(teacher), strict=True)
    tckd, nckd = ((theirs.exp() * (theirs - ours)).sum(dim=1) for ours, theirs in parts)
    return tckd, nckd
