"""OFA-KD: project every stage of the student to class scores and compare them with the teacher's."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.inputs import check_labels, like_parameters
from diffkd.methods.kd import check_logits


class OFAKD(nn.Module):
    """One-for-all distillation between different families (Hao, Guo, Han, Tang, Hu, Wang, Xu, NeurIPS 2023).

    Each stage of the student has an exit (auxiliary head) to class scores, which do not depend on the architecture.
    :func:`ofa_loss` compares exits and the student's own scores with the teacher's; the losses are summed. The
    teacher's features are not used, so that it may be of any family.

    An exit is a depthwise separable convolution of stride 2 for each stage that follows, average pooling and a linear
    layer, as in the authors' code for convolutional students; for transformers they use attention blocks, whereas here
    tokens are read as a map. The defaults are those of their code: temperature 1, gamma 1 (1.0 to 1.5 by pair).

    Args:
        student: shapes of the student's stages, from shallow to deep, and of its scores.
        teacher: shape of the teacher's scores, in a list.
        gamma: exponent of the target's enhancement, one for all; 1 makes it the cross-entropy with the teacher.
        temperature: tau > 0.
        weight: factor of all losses.

    Raises:
        ValueError: if there are no stages, the class counts differ or are below 2, or a number is out of range.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"stages to logits"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    least_classes: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("labels",)

    def __init__(
        self,
        student: Sequence[FeatureShape],
        teacher: Sequence[FeatureShape],
        *,
        gamma: float = 1.0,
        temperature: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if len(student) < 2 or len(teacher) != 1:
            raise ValueError(
                f"OFAKD needs the student's stages and scores and the teacher's scores, got {len(student)} and "
                f"{len(teacher)} layers"
            )
        check_logits("OFAKD", student[-1], teacher[0], temperature)
        *stages, _ = student
        width = stages[-1].channels
        self.exits = nn.ModuleList(
            _exit(stage, len(stages) - 1 - depth, width, teacher[0].channels) for depth, stage in enumerate(stages)
        )
        self.gamma, self.temperature, self.weight = gamma, temperature, weight

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, labels: Tensor) -> dict[str, Tensor]:
        """Compare all exits with the teacher.

        Args:
            student: (B, C, H, W) or (B, C) of each stage, and logits (B, K).
            teacher: logits (B, K), in a list.
            labels: (B,) int64.

        Returns:
            {"kd": loss of the student's own scores, "exits": sum of the exits' losses}.
        """
        *stages, own = student
        check_labels("OFAKD", labels, (len(own),))
        target = teacher[0].detach()
        scores = [self.exits[depth](like_parameters(stage, self)) for depth, stage in enumerate(stages)]
        losses = [ofa_loss(one, target, labels, self.gamma, self.temperature) for one in scores]
        own_loss = ofa_loss(own, target, labels, self.gamma, self.temperature)
        return {"kd": self.weight * own_loss, "exits": self.weight * torch.stack(losses).sum()}


def ofa_loss(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float, temperature: float = 1.0) -> Tensor:
    """Return the mean of `-sum_c ((p_t + y)^gamma - y) log p_s` for logits (B, K), y being the label's indicator.

    A gamma above 1 raises the weight of the labelled class where the teacher is confident in it.
    """
    ours = (at_least_float32(student) / temperature).log_softmax(dim=1)
    theirs = (at_least_float32(teacher) / temperature).softmax(dim=1)
    hard = torch.zeros_like(theirs).scatter(1, labels[:, None], 1.0)
    return -(((theirs + hard).pow(gamma) - hard) * ours).sum(dim=1).mean()


def _exit(stage: FeatureShape, halvings: int, width: int, classes: int) -> nn.Module:
    if not stage.is_map:
        return nn.Linear(stage.channels, classes)
    layers: list[nn.Module] = []
    channels = stage.channels
    for left in range(halvings, 0, -1):
        out = width if left == 1 else 2 * channels
        layers.append(_separable(channels, out))
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _separable(inputs: int, outputs: int) -> nn.Module:
    """Return a depthwise separable convolution of stride 2 to `outputs` channels.

    Group normalisation with one group replaces the authors' batch normalisation, which fails for a batch of one map of
    one position.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.GroupNorm(1, outputs),
        nn.ReLU(),
    )
