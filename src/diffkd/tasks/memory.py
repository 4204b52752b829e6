"""The peak memory of a training."""

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def reset_peak() -> None:
    """Forget the peak so far, of all GPUs and, on Linux, of this process."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    if _STATUS.exists():
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return  # a hardened kernel; the peak then counts from the start of the process


def peak_memory(device: torch.device) -> float:
    """Return the peak since :func:`reset_peak` in MiB: of the GPU's own memory, or of this process for the CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
