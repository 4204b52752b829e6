"""Peak memory of a training, and the thresholds of glibc's allocator."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

resource: ModuleType | None
try:
    import resource
except ImportError:  # on Windows
    resource = None

_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def reset_peak() -> None:
    """Reset the peak of all GPUs and, on Linux, of this process, after collecting garbage of earlier trainings.

    Trainer, model and data form reference cycles, which Python collects rarely when there are few objects.
    """
    gc.collect()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    if _STATUS.exists():
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return  # a hardened kernel: the peak is then that since the start of the process


def peak_memory(device: torch.device) -> float:
    """Return the peak since :func:`reset_peak` in MiB: of the GPU's own memory, or of this process for the CPU.

    0 if unknown.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 2**10, 1)
    if resource is None:
        return round(_peak_of_windows() / 2**20, 1)
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed CPU memory in glibc's heap for the next step inside this context, and release it at the end.

    By default glibc returns large blocks to the kernel at once, and page faults then cost a tenth of a small network's
    training step. Does nothing with other allocators, or if the environment sets glibc's thresholds.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the maximum: larger blocks still come from the kernel
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 2**26)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2**17)
        libc.mallopt(_M_TOP_PAD, 0)
        libc.malloc_trim(0)


def _peak_of_windows() -> int:
    """Return the peak working set of this process in bytes, 0 if unknown."""

    class Counters(ctypes.Structure):
        _fields_ = (
            ("size", ctypes.c_ulong),
            ("faults", ctypes.c_ulong),
            *((name, ctypes.c_size_t) for name in ("peak", "now", "a", "b", "c", "d", "pagefile", "peak_pagefile")),
        )

    libraries: Any = getattr(ctypes, "windll", None)
    if libraries is None:
        return 0
    counters = Counters(size=ctypes.sizeof(Counters))
    current = libraries.kernel32.GetCurrentProcess
    current.restype = ctypes.c_void_p
    found = libraries.psapi.GetProcessMemoryInfo(ctypes.c_void_p(current()), ctypes.byref(counters), counters.size)
    return int(counters.peak) if found else 0


def _glibc() -> ctypes.CDLL | None:
    """The C library, if its allocator is glibc's and has no settings in the environment."""
    if sys.platform != "linux" or any(
        name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ
    ):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
