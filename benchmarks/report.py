"""Where and with what a measurement was made, and the files that it leaves."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def machine(device: str) -> dict[str, Any]:
    """Return device, threads and versions."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("torchvision", "diffusers"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table, the first as its head.

    >>> print(table([("a", "b"), ("1", "22")]))
    | a   | b   |
    | --- | --- |
    | 1   | 22  |
    """
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(lines)


def with_quartiles(facts: Mapping[str, float], digits: int) -> str:
    """Return a spread as a cell of a table, such as "1.20 [1.10, 1.30]"."""
    return f"{facts['median']:.{digits}f} [{facts['low']:.{digits}f}, {facts['high']:.{digits}f}]"


def save(folder: Path, name: str, facts: Mapping[str, Any], figure: Figure | None = None) -> None:
    """Write `facts` as JSON and the figure as PNG into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if figure is not None:
        figure.savefig(folder / f"{name}.png", dpi=120)


def _processor() -> str:
    """The processor as Linux names it, with what matters for half precision."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    return " ".join([facts.get("model name", platform.machine()), *flags])
