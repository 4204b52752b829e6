"""What a step does, counted: multiply-adds, bytes moved, and kernels launched on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(step: Callable[[], None]) -> int:
    """Return the multiply-adds of the matrix products and convolutions of a step, forward and backward.

    A compiled step must be counted uncompiled.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops()) // 2


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the tensors that operators read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and add up its tensors' entries."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def bytes_moved(step: Callable[[], None]) -> int:
    """Return the bytes that the operators of a step read and write, each by itself.

    What a compiler or a cache keeps from memory is not taken off, what an operator moves within itself not added. A
    compiled step must be counted uncompiled.
    """
    traffic = _Traffic()
    with traffic:
        step()
    return traffic.moved


def kernel_launches(step: Callable[[], None]) -> int | None:
    """Return how many kernels a step launches on the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    launches = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
    return sum(1 for event in recorded.events() if event.name in launches)
