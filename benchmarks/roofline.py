"""What a machine could do at best: its measured rates, and the time that a step's operations and bytes take at them.

The roofline model (Williams, Waterman, Patterson, Communications of the ACM 52, 2009): a step takes at least as long as
its arithmetic at the highest rate of arithmetic, and at least as long as its traffic at the highest rate of memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """What a device reaches on one large operation.

    Attributes:
        multiply_adds_per_second: of a large matrix product.
        bytes_per_second: read and written by a large copy.
    """

    multiply_adds_per_second: float
    bytes_per_second: float

    def seconds(self, multiply_adds: float, moved: float) -> float:
        """Return the least time for so many multiply-adds and so many bytes.

        >>> Rates(multiply_adds_per_second=100, bytes_per_second=10).seconds(200, 50)
        5.0
        """
        return max(multiply_adds / self.multiply_adds_per_second, moved / self.bytes_per_second)


def measured_rates(
    device: str, dtype: torch.dtype = torch.float32, *, size: int | None = None, block: int | None = None
) -> Rates:
    """Measure the rates of a device; on a GPU float32 products may use TF32, as its convolutions do.

    Args:
        device: "cpu" or "cuda".
        dtype: of the product.
        size: edge of its square matrices; None: large enough for the device.
        block: bytes that are copied; None: more than the device's caches hold.
    """
    size, block = size or (8192 if device == "cuda" else 2048), block or (2**30 if device == "cuda" else 2**28)
    a = torch.randn(size, size, device=device).to(dtype)
    memory, copy = torch.zeros(2, block, device=device, dtype=torch.int8)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return Rates(size**3 / _best(lambda: a @ a, device), 2 * block / _best(lambda: copy.copy_(memory), device))
    finally:
        torch.set_float32_matmul_precision(precision)


def _best(run: Callable[[], object], device: str, times: int = 7) -> float:
    best = float("inf")
    for _ in range(times):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
