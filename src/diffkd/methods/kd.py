"""KD: match softened class distributions. Logit standardisation."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32, check_several_classes, kl_by_position, kl_divergence
from diffkd.features.shape import FeatureShape, Want, channels_of


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Return the Z-scores of logits over the classes: mean 0, standard deviation 1 for each sample or position.

    `Z(z) = (z - mean(z)) / (std(z) + eps)`, applied to both sides before the temperature. Sun, Ren, Li, Wang, Cao,
    *Logit Standardization in Knowledge Distillation*, CVPR 2024. The standard deviation is that of a sample, divided by
    K - 1, as in the authors' code. They train with temperature 2 and a loss weight of 9 on CIFAR-100.

    Args:
        logits: (B, K) or (B, K, H, W).
        eps: added to the standard deviation, as in the authors' code.

    Returns:
        The same shape in float32 or wider, invariant to shifts and (up to `eps`) positive factors of the logits.
    """
    logits = at_least_float32(logits)
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (logits.std(dim=1, correction=1, keepdim=True) + eps)


class KD(nn.Module):
    """Knowledge distillation on logits (Hinton, Vinyals, Dean, 2015); on class maps per position.

    Args:
        student: the student's number of classes or shape, checked against the teacher's; optional.
        teacher: the teacher's number of classes or shape.
        temperature: tau > 0; the loss is scaled by tau^2, so that its gradient keeps its scale.
        standardize: first standardise the logits of each sample to mean 0 and standard deviation 1 (Sun et al., *Logit
            Standardization in Knowledge Distillation*, CVPR 2024).
        average_positions: on maps, divide by the number of positions, as in dense prediction (Liu et al.,
            *Structured Knowledge Distillation for Semantic Segmentation*, CVPR 2019); False: sum over them, as the
            DiffKD authors' code does.
        weight: factor of the loss.

    Raises:
        ValueError: if the class counts differ or are below 2, or `temperature` is not positive.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"logits"})
    least_classes: ClassVar[int] = 2

    def __init__(
        self,
        student: int | FeatureShape | None = None,
        teacher: int | FeatureShape | None = None,
        *,
        temperature: float = 4.0,
        standardize: bool = False,
        average_positions: bool = True,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_logits("KD", student, teacher, temperature)
        self.temperature, self.weight = temperature, weight
        self.standardize, self.average_positions = standardize, average_positions

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for logits (B, K) or (B, K, H, W)."""
        if self.standardize:
            student, teacher = standardize(student), standardize(teacher)
        divergence = kl_by_position if self.average_positions else kl_divergence
        return {"kd": self.weight * divergence(student, teacher, self.temperature)}


def check_logits(
    who: str, student: int | FeatureShape | None, teacher: int | FeatureShape | None, temperature: float
) -> None:
    """Raise ValueError unless both logits have the same number of classes, 2 or more, and the temperature is above 0.

    Args:
        who: name of the method, for messages.
        student: the student's number of classes or shape; None: not known.
        teacher: the teacher's.
        temperature: tau.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    for side in (student, teacher):
        if side is not None:
            check_several_classes(who, channels_of(side))
    if student is None or teacher is None:
        return
    ours, theirs = channels_of(student), channels_of(teacher)
    if ours != theirs:
        raise ValueError(
            f"the student's logits have {ours} classes, the teacher's {theirs}: they cannot be compared; "
            "distil features instead (FitNet or DiffKD on a feature pair)"
        )
