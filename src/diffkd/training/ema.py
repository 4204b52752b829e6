"""EMA: the exponential moving average of the student's weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffkd.files.weights import unwrap
from diffkd.tasks.distributed import full_tensor


class StudentEMA:
    """Exponential moving average of a student's parameters and buffers (Polyak averaging).

    Not an `nn.Module`, so that the average is neither a submodule, nor broadcast, nor optimised. The arithmetic is that
    of `torch.optim.swa_utils.AveragedModel`, whose counter would synchronise with the device at every step.

    Args:
        student: copied here; the first update copies its weights again without averaging.
        decay: share of the old average kept in each update, in (0, 1).

    Raises:
        ValueError: if `decay` is outside (0, 1).
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema must lie between 0 and 1, such as 0.9999, got {decay}; leave it out for no average")
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(unwrap(student)).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Update the average with the student's current weights; call after each optimiser step."""
        averaged, current = _tensors(self.model), _tensors(unwrap(student))
        self.updates += 1
        if self.updates == 1:
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)
            return
        lerp = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for old, new in zip(averaged, current, strict=True):
            olds, news = kinds.setdefault(old.dtype, ([], []))
            olds.append(old)
            news.append(new.detach().to(old.dtype))  # the average of a bfloat16 student stays in float32
        for dtype, (olds, news) in kinds.items():
            if dtype.is_floating_point:
                lerp(olds, news, None)
            else:  # counters, such as BatchNorm's num_batches_tracked
                for old, new in zip(olds, news, strict=True):
                    old.copy_(new)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.updates = int(state["updates"])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [full_tensor(tensor) for tensor in (*model.parameters(), *model.buffers())]
