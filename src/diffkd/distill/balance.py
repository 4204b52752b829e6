"""Gradient-based weights of pairs: the ratio of the gradient norms of a method and of the task's loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from diffkd.diffusion.distances import at_least_float32


@dataclass(frozen=True)
class Balance:
    """A pair's weight that keeps the norm of the method's gradient at a multiple of that of the task's.

    The weight is `balance` * |gradient of the task| / |gradient of the pair's unweighted losses|, both with respect to
    the student's feature of the pair as it is recorded (of several features together), each norm averaged over the
    measurements: exactly over the first 1 / (1 - `momentum`), forgetting by `momentum` from then on. It is the
    gradient-guided adaptive modulation of Liao et al., *RT-DETRv4*, arXiv 2510.25257, Sec. 3.3, for any pair.

    Args:
        balance: target ratio of the gradient norms of method and task; 1: equal norms.
        every: batches between two measurements. Each costs two partial backward passes, from the task's loss and from
            the method's down to the feature, and retains the graph for the actual backward.
        momentum: of the average over the measurements.

    Raises:
        ValueError: if a number is out of range.
    """

    balance: float = 1.0
    every: int = 10
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not (0 < self.balance < math.inf and self.every >= 1 and 0 <= self.momentum < 1):
            raise ValueError(
                "a Balance needs balance > 0, every >= 1 and momentum in [0, 1), got "
                f"{self.balance}, {self.every} and {self.momentum}"
            )


@dataclass
class Measurable:
    """The tensors of a forward that a measurement of gradients needs.

    Args:
        features: the student's recorded features of each pair.
        losses: the sum of each pair's losses, unweighted.
        terms: the losses of each pair, unweighted.
        factors: the factor of each pair's losses apart from its weight.
    """

    features: list[list[Tensor]]
    losses: list[Tensor]
    terms: list[Mapping[str, Tensor]]
    factors: list[Tensor | float]

    def norms(self, task: Tensor, pairs: Sequence[int]) -> list[tuple[Tensor, Tensor | None]]:
        """Return the norms of the gradients of the method and of the task at the features of some pairs.

        Both are squared, scalars in float32; that of the task is None if it does not depend on the features.
        """
        # Gradients underflow in float16: both losses are scaled by the same power of two.
        half = any(feature.dtype == torch.float16 for index in pairs for feature in self.features[index])
        scale = 2.0**12 if half else 1.0
        every = {id(f): f for index in pairs for f in self.features[index] if f.requires_grad}
        if not task.requires_grad or not every:
            return [(self.losses[index].new_zeros((), dtype=torch.float32), None) for index in pairs]
        found = torch.autograd.grad(scale * task, list(every.values()), retain_graph=True, allow_unused=True)
        of_task = dict(zip(every, found, strict=True))
        result = []
        for index in pairs:
            features = [feature for feature in self.features[index] if feature.requires_grad]
            loss = self.losses[index]
            pulled: Sequence[Tensor | None] = []
            if features and loss.requires_grad:
                pulled = torch.autograd.grad(scale * loss, features, retain_graph=True, allow_unused=True)
            tasks = [of_task[id(feature)] for feature in features]
            reached = any(one is not None for one in tasks)
            result.append((_squared(pulled, loss, scale), _squared(tasks, loss, scale) if reached else None))
        return result


def _squared(gradients: Sequence[Tensor | None], like: Tensor, scale: float) -> Tensor:
    total = torch.zeros((), device=like.device)
    for gradient in gradients:
        if gradient is not None:
            total = total + (at_least_float32(gradient) / scale).square().sum().float()
    return total


class Balancer(nn.Module):
    """Holds the weights of a distiller's pairs that have a :class:`Balance`.

    Args:
        weights: of all pairs.
        names: of all pairs, for messages.

    Attributes:
        norms: (pairs, 2) averages of the gradient norms of method and task, zeros before the first measurement.
        count: batches seen, an int64 scalar.
    """

    norms: Tensor
    count: Tensor

    def __init__(self, weights: Sequence[float | Balance], names: Sequence[str]) -> None:
        super().__init__()
        self.balances = {index: one for index, one in enumerate(weights) if isinstance(one, Balance)}
        self.names = tuple(names)
        self.register_buffer("norms", torch.zeros(len(weights), 2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.calls = 0  # `count` on the host, which needs no synchronisation
        self.register_load_state_dict_post_hook(_take_over_count)  # type: ignore[no-untyped-call]

    @property
    def due(self) -> list[int]:
        """The indices of the pairs to measure on this batch."""
        return [index for index, one in self.balances.items() if self.calls % one.every == 0]

    def weight(self, index: int) -> Tensor:
        """Return the weight of a pair, a scalar; 0 before its first measurement."""
        method, task = self.norms[index].unbind()
        return torch.where(method > 0, self.balances[index].balance * task / method, torch.zeros_like(task))

    def update(self, measurable: Measurable, task: Tensor) -> None:
        """Measure the pairs that are due, over all ranks, and update the averages.

        Raises:
            ValueError: if the task's loss does not depend on the feature of a pair.
        """
        pairs = self.due
        measured = measurable.norms(task, pairs)
        squares = []
        for index, (of_method, of_task) in zip(pairs, measured, strict=True):
            if of_task is None:
                raise ValueError(
                    f"pair '{self.names[index]}' has a Balance, but the task's loss does not depend on its student's "
                    "layer: pair a layer on the way to the output, or give a number as weight"
                )
            squares.append(torch.stack([of_method, of_task]))
        every = torch.stack(squares)  # (due, 2)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(every)
        new = every.sqrt().to(self.norms)
        for row, index in enumerate(pairs):
            balance = self.balances[index]
            share = max(1 / (self.calls // balance.every + 1), 1 - balance.momentum)
            # A batch that overflowed in half precision is skipped.
            usable = new[row].isfinite().all()
            self.norms[index] = torch.where(usable, self.norms[index].lerp(new[row], share), self.norms[index])

    def advance(self) -> None:
        """Count a batch."""
        self.calls += 1
        self.count.add_(1)

    def _apply(self, fn: Any, recurse: bool = True) -> "Balancer":
        before = self.norms
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.norms.dtype.itemsize < 4:
            self.norms = before.to(self.norms.device)
        return self


def _take_over_count(module: nn.Module, incompatible: Any) -> None:
    if isinstance(module, Balancer):
        module.calls = int(module.count)
