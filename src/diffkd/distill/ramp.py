"""Ramps: the factor of a distillation loss at each epoch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """A factor that depends on the epoch: 0 before `start`, then a linear warm-up to 1, 0 again from `stop` on.

    Args:
        start: first epoch in which the loss applies, counted from 0; fractions are allowed.
        warmup: epochs in which the factor rises from 0 to 1.
        stop: epoch from which the loss is off; None: never.
        by_epoch: keep the factor constant within an epoch, 1 / warmup in the first, as in mdistiller. With a warm-up
            of one epoch the factor is 1 from the first step.

    Raises:
        ValueError: if a number is negative or not finite, or `stop` is not after `start`.
    """

    start: float = 0.0
    warmup: float = 0.0
    stop: float | None = None
    by_epoch: bool = False

    def __post_init__(self) -> None:
        counts = 0 <= self.start < math.inf and 0 <= self.warmup < math.inf  # which NaN is not
        if not (counts and (self.stop is None or self.stop > self.start)):
            raise ValueError(
                f"a ramp needs start >= 0, warmup >= 0 and stop > start, got {self.start}, {self.warmup}, {self.stop}"
            )

    @property
    def is_constant(self) -> bool:
        """Whether the factor is 1 throughout."""
        always = self.start == 0 and self.stop is None
        return always and (self.warmup == 0 or (self.by_epoch and self.warmup <= 1))

    def __call__(self, epoch: float) -> float:
        """Return the factor at an epoch, fractional within it.

        >>> ramp = Ramp(start=2, warmup=4, stop=10)
        >>> [ramp(epoch) for epoch in (0, 2, 4, 6, 9.9, 10)]
        [0.0, 0.0, 0.5, 1.0, 1.0, 0.0]
        """
        if epoch < self.start or (self.stop is not None and epoch >= self.stop):
            return 0.0
        passed = math.floor(epoch - self.start) + 1 if self.by_epoch else epoch - self.start
        return min(1.0, passed / self.warmup) if self.warmup else 1.0


ALWAYS = Ramp()
"""A factor of 1 throughout."""
