"""What a step does, counted: multiply-adds, and kernels launched on a GPU."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(step: Callable[[], None]) -> int:
    """Return the multiply-adds of the matrix products and convolutions of a step, forward and backward.

    A compiled step must be counted uncompiled.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops()) // 2


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
