"""Peak memory of a step: on a GPU as the allocator counts it, on a CPU by following every tensor's storage."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages made inside that are still alive, and the most there ever were.

    What an operator allocates and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what comes out."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(make: Callable[[], Callable[[], None]], device: str = "cpu") -> int:
    """Return the most memory that building a step and running it twice takes, in bytes.

    Building is part of it: parameters, gradients and momentum count. On a CPU everything must be made within `make`.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before: int = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = make()
        step(), step()
        torch.cuda.synchronize()
        peak: int = torch.cuda.max_memory_allocated()
        return int(peak - before)
    with LiveBytes() as live:
        step = make()
        step(), step()
    peak_of_all: int = live.peak
    return peak_of_all
