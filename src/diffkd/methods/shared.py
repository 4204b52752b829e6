"""One method with shared parameters, such as one denoiser, for all levels of a feature pyramid."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diffkd.features.layout import resize
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods import DiffKD, MethodFactory


class SharedOutput(NamedTuple):
    """What one forward of :class:`Shared` returns.

    Attributes:
        losses: each term summed over the levels.
        results: the method's return value for each level.
        gamma: gamma of all images and levels, (B * levels,); None for methods without it.
    """

    losses: dict[str, Tensor]
    results: list[Any]
    gamma: Tensor | None


class Shared(nn.Module):
    """Applies one method to all levels of a pyramid; otherwise automatic pairing builds one for each level.

    Levels with equal channels share an instance. For methods of single maps whose parameters do not depend on the size
    of the maps, such as DiffKD, FitNet, MGD and FGD. In YAML:

        method:
          class_path: diffkd.Shared
          init_args: {method: {class_path: diffkd.DiffKD, init_args: {kd_weight: 5.0}}}

    Args:
        student: the student's shapes, a map for each level.
        teacher: the teacher's shapes, a map for each level.
        method: the factory, such as a method's class.

    Raises:
        ValueError: if there are no levels, or their numbers differ.

    >>> levels = [FeatureShape(8, (4, 4)), FeatureShape(8, (2, 2))]
    >>> losses = Shared(levels, levels)(*[[torch.randn(2, 8, n, n) for n in (4, 2)]] * 2).losses
    >>> sorted(losses)
    ['diffusion', 'kd']
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"levels"})

    def __init__(
        self, student: Sequence[FeatureShape], teacher: Sequence[FeatureShape], *, method: MethodFactory = DiffKD
    ) -> None:
        super().__init__()
        if isinstance(student, FeatureShape) or isinstance(teacher, FeatureShape):
            raise ValueError("Shared serves several levels: give the pair lists of layers, or the method itself")
        if not student or len(student) != len(teacher):
            raise ValueError(f"Shared needs as many levels of both, got {len(student)} and {len(teacher)}")
        channels = [(ours.channels, theirs.channels) for ours, theirs in zip(student, teacher, strict=True)]
        distinct = list(dict.fromkeys(channels))
        self.which = [distinct.index(one) for one in channels]
        firsts = [channels.index(one) for one in distinct]
        self.methods = nn.ModuleList(method(student[index], teacher[index]) for index in firsts)

    @property
    def needs(self) -> tuple[str, ...]:
        """Keyword arguments that the method needs besides features."""
        return tuple(dict.fromkeys(name for method in self.methods for name in getattr(method, "needs", ())))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], **needed: Any) -> SharedOutput:
        """Apply the method level by level.

        Args:
            student: (B, Cs, H, W) of each level, resized to the teacher's size if that differs.
            teacher: (B, Ct, H, W) of each level.
            needed: the arguments that :attr:`needs` names.

        Returns:
            A :class:`SharedOutput`.
        """
        results = []
        for which, ours, theirs in zip(self.which, student, teacher, strict=True):
            if ours.ndim == theirs.ndim == 4:
                ours = resize(ours, (theirs.shape[2], theirs.shape[3]))
            results.append(self.methods[which](ours, theirs, **needed))
        each = [result if isinstance(result, dict) else result.losses for result in results]
        losses = {term: torch.stack([losses[term] for losses in each]).sum() for term in each[0]}
        gammas = [gamma for result in results if (gamma := getattr(result, "gamma", None)) is not None]
        return SharedOutput(losses, results, torch.cat(gammas) if gammas else None)
