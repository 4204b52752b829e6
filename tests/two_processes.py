"""Two processes that train together, as torchrun starts them, from the server that has the imports done."""

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_in_two(log: Path, work: Callable[..., Any], *arguments: Any) -> tuple[list[int | None], str]:
    """Call a function of a module in two processes of one group; return their exit codes and what they said."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    both = [context.Process(target=_as_rank, args=(rank, port, log, work, arguments)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        process.kill()
        process.join()
    return [process.exitcode for process in both], log.read_text(encoding="utf-8")


def _as_rank(rank: int, port: int, log: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    started |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    os.environ.update({name: str(value) for name, value in started.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    work(*arguments)
