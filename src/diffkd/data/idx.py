"""The IDX format in which MNIST and Fashion-MNIST are published: big-endian sizes, then bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped.

    Args:
        path: the file; one that ends in `.gz` is unpacked while it is read.
        ndim: number of dimensions the file must have: 3 for images, 1 for labels.

    Returns:
        uint8 tensor of the shape that the file states.

    Raises:
        ValueError: if the file is not IDX, has other dimensions, or is truncated or longer than it states; names the
            file.
        OSError: if the file cannot be opened.
    """
    mend = "fetch the file again"
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            header = file.read(4 + 4 * ndim)
            if header[:4] != bytes([0, 0, 8, ndim]):
                raise ValueError(
                    f"{path}: not an IDX file of bytes in {ndim} dimension(s), it begins {header[:4]!r}; {mend}."
                )
            shape = struct.unpack(f">{ndim}I", header[4:])
            content = file.read(math.prod(shape) + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error, struct.error, MemoryError) as error:
            raise ValueError(f"{path}: truncated or damaged ({error!r}); {mend}.") from error
    if len(content) != math.prod(shape):
        raise ValueError(f"{path}: states {math.prod(shape)} bytes {shape}, holds {len(content)} or more; {mend}.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)
