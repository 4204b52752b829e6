"""The losses of an epoch, accumulated on the device: means by term, and the first non-finite step.

Only :meth:`LossLog.check`, :meth:`LossLog.latest` and :meth:`LossLog.means` synchronise with the device.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from diffkd.tasks.distributed import several_processes

_NEVER = 2**62


class LossLog:
    """Sums the losses of an epoch, and stores for each the first step at which it was not finite.

    All records until :meth:`clear` must have the names of the first.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.count = 0
        self.first_step = self.last_step = 0
        self._sums: Tensor | None = None
        self._latest: Tensor | None = None
        self._broken: Tensor | None = None  # first non-finite step by name; the last entry is for the images

    def record(self, step: int, values: Mapping[str, Tensor], images: Tensor | Sequence[Tensor]) -> None:
        """Add the losses of one step.

        Args:
            step: number of the step in the whole training.
            values: scalars by name, or tensors of which the mean is taken.
            images: the batch, (B, ...) or a list of (...), checked for values that are not finite.

        Raises:
            ValueError: if the names differ from those of the earlier steps.
        """
        if not self.names:
            self.names, self.first_step = tuple(values), step
        elif set(self.names) != set(values):
            raise ValueError(f"the losses of step {step} are {sorted(values)}, before they were {sorted(self.names)}")
        with torch.no_grad():
            row = torch.stack([values[name].detach().float().mean() for name in self.names])
            whole = torch.stack(
                [image.isfinite().all() for image in ([images] if isinstance(images, Tensor) else images)]
            )
            finite = torch.cat([row.isfinite(), whole.all()[None]])
            broken = torch.where(finite, _NEVER, step)
            if self._sums is None or self._broken is None:
                self._sums, self._broken = torch.zeros_like(row), torch.full_like(broken, _NEVER)
            self._sums = self._sums.to(row.device) + row
            self._broken = torch.minimum(self._broken.to(row.device), broken)
        self._latest, self.last_step = row, step
        self.count += 1

    def check(self) -> None:
        """Synchronise with the device, and raise on all ranks if a recorded value was not finite.

        Raises:
            FloatingPointError: names the first step, the terms, and whether the images were not finite.
        """
        if self._broken is None:
            return
        broken = self._broken.clone()
        if several_processes():
            distributed.all_reduce(broken, op=distributed.ReduceOp.MIN)
        steps = broken.tolist()
        *by_name, images = steps
        first = min(steps)
        if first == _NEVER:
            return
        terms = [name for name, step in zip(self.names, by_name, strict=True) if step == first]
        if images == first:
            cause = "the images of that batch held NaN or infinity: mend the data"
        elif first == 0:
            cause = "the images were finite, and nothing had been learned: look at the models and the method's values"
        else:
            cause = "the images were finite: lower the learning rate, clip gradients, or train in a wider precision"
        what = f"loss '{terms[0]}'" if len(terms) == 1 else "losses " + ", ".join(f"'{term}'" for term in terms)
        raise FloatingPointError(
            f"{what if terms else 'a batch'} was not finite at step {first}; {cause}. No checkpoint holds that step."
        )

    def latest(self) -> dict[str, float]:
        """Synchronise with the device and return the values of the last step by name."""
        values = [] if self._latest is None else self._latest.tolist()
        return dict(zip(self.names, values, strict=False))

    def means(self) -> dict[str, float]:
        """Synchronise with the device and return the means over all steps since :meth:`clear` and over all ranks."""
        if self._sums is None:
            return {}
        sums = self._sums.clone()
        processes = 1
        if several_processes():
            distributed.all_reduce(sums)
            processes = distributed.get_world_size()
        return dict(zip(self.names, (sums / (self.count * processes)).tolist(), strict=True))

    def clear(self) -> None:
        """Reset, at the end of an epoch."""
        self.names, self.count = (), 0
        self._sums = self._latest = self._broken = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of an unfinished epoch, so that a resumed one has the same means."""
        return {
            "names": list(self.names),
            "count": self.count,
            "first_step": self.first_step,
            "sums": None if self._sums is None else self._sums.cpu(),
            "broken": None if self._broken is None else self._broken.cpu(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""
        self.names, self.count, self.first_step = tuple(state["names"]), state["count"], state["first_step"]
        self._sums, self._broken = state["sums"], state["broken"]
