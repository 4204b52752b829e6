"""Stopping a training from outside: Ctrl-C or a termination signal asks, the training answers at its next step."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import distributed

from diffkd.tasks.replicas import several_processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818  (a request that was met is no error)
    """A training stopped because it was asked to, after saving a checkpoint.

    Args:
        message: what was saved and how to go on.
        signum: the signal that asked.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one of the same kind kills as usual.

    One of each is a single request: Ctrl-C reaches all processes of a terminal, and whoever started this one may pass
    it on as SIGTERM.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take the two signals over. Only the main thread may; elsewhere nothing is changed."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {signum: signal.signal(signum, self._note) for signum in _SIGNALS}

    def stop_listening(self) -> None:
        """Give the signals back to whoever had them before."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def agreed(self, device: torch.device) -> int:
        """Return the signal that any of the processes has received, 0 if none; call on all of them at once."""
        if not several_processes():
            return self.signum
        flag = torch.tensor(self.signum, device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return int(flag)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
