"""What runs in the processes of the campaign: commands, and the faults that are injected into them.

Processes are forked by a server that has imported this module, and so PyTorch and Lightning, once: a run that is killed
after a second costs a second.
"""

import contextlib
import ctypes
import gc
import io
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401
import timm  # noqa: F401
import torch
import torchmetrics  # noqa: F401
import torchvision  # noqa: F401
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: F401

import diffkd.commands.compare
import diffkd.commands.inspect_file
import diffkd.data
import diffkd.models
import diffkd.training.fit  # noqa: F401
from diffkd.commands.cli import main

torch.set_num_threads(1)

STEPS = "DIFFKD_CAMPAIGN_STEPS"
"""Environment variable: the file that :class:`CountedSGD` appends a byte to at every step."""

AT_STEP: dict[int, Callable[[], None]] = {}
"""Faults of this process by the step of the training, counted from the start of the process."""


class CountedSGD(torch.optim.SGD):
    """SGD that tells another process how many steps it has taken, and lets faults happen at a step."""

    taken = 0

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Take a step; one of a single parameter is a trial before the training."""
        if len(self.param_groups[0]["params"]) == 1:
            return super().step(closure)
        CountedSGD.taken += 1
        if action := AT_STEP.get(CountedSGD.taken):
            action()
        result = super().step(closure)
        if file := os.environ.get(STEPS):
            with open(file, "ab", buffering=0) as stream:  # noqa: PTH123
                stream.write(b".")
        return result


@dataclass
class Outcome:
    """How a command ended.

    Attributes:
        code: its exit code; None if it was killed, a text if an exception left it.
        out: what it printed.
        err: its messages.
        seconds: how long it took.
        peak: its peak memory in bytes, and what it was before the command.
        extra: what the preparation of the command has noted.
    """

    code: int | str | None = None
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    peak: tuple[int, int] = (0, 0)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """The messages, without the warnings."""
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith("diffkd: warning")]


Prepare = Callable[[dict[str, Any]], None]


def run_command(words: Sequence[str], answer: Connection, prepare: Prepare | None, environment: dict[str, str]) -> None:
    """Run a command in this process, and send its :class:`Outcome`."""
    os.setsid()
    gc.freeze()  # every training collects garbage, and the imports alone are a million objects
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    done = Outcome()
    out, err = io.StringIO(), io.StringIO()
    before, start = _peak(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            if prepare is not None:
                prepare(done.extra)
            done.code = main(list(words))
        except BaseException as error:
            traceback.print_exc()
            done.code = type(error).__name__
    done.out, done.err = out.getvalue(), err.getvalue()
    done.seconds, done.peak = time.monotonic() - start, (_peak(), before)
    done.extra["cpu"] = time.process_time()
    answer.send(done)
    answer.close()


def call(function: Callable[..., Any], arguments: tuple[Any, ...], answer: Connection) -> None:
    """Call a function in this process, and send what it returns."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer.send(function(*arguments))
    except BaseException:
        answer.send(traceback.format_exc())
    answer.close()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Faults ---------------------------------------------------------------------------------------------------------------


@dataclass
class FullDisk:
    """No file grows any more from the n-th file on that the process opens for writing in a folder.

    Args:
        folder: the folder.
        write: the number n, from 1; 0 counts the files, and nothing fails.
    """

    folder: str
    write: int

    def __call__(self, extra: dict[str, Any]) -> None:
        """Watch the process."""
        extra["writes"] = []

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event != "open" or not isinstance(arguments[0], str) or not arguments[0].startswith(self.folder):
                return
            flags = arguments[2]
            if not flags & (os.O_WRONLY | os.O_RDWR) or Path(arguments[0]).name == ".lock":
                return
            if arguments[0] in extra["writes"] or os.path.isdir(arguments[0]):  # noqa: PTH112
                return
            extra["writes"].append(arguments[0])
            if len(extra["writes"]) == self.write:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

        sys.addaudithook(watch)


@dataclass
class Removed:
    """A folder is removed at a step of the training."""

    folder: str
    step: int

    def __call__(self, extra: dict[str, Any]) -> None:
        """Set the fault."""
        AT_STEP[self.step] = lambda: shutil.rmtree(self.folder)


@dataclass
class Unprivileged:
    """The process loses root's power to write everywhere; it keeps its user, who may alone read Python's own files."""

    def __call__(self, extra: dict[str, Any]) -> None:
        """Give all capabilities away."""
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, of this process
        none = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits each
        if ctypes.CDLL(None, use_errno=True).capset(header, none):
            raise OSError(ctypes.get_errno(), "capset")


@dataclass
class Contained:
    """Notes everything that a hostile file could make a process do, and bounds its memory.

    Args:
        allowed: the folder in which it may write.
        memory: bytes that its address space may grow by.
        seconds: of its CPU time.
    """

    allowed: str
    memory: int
    seconds: int

    def __call__(self, extra: dict[str, Any]) -> None:
        """Watch the process."""
        extra["acts"] = []
        os.chdir(self.allowed)
        tempfile.tempdir = os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.allowed
        size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limit = size + self.memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        used = resource.getrusage(resource.RUSAGE_SELF)
        ends = int(used.ru_utime + used.ru_stime) + self.seconds
        resource.setrlimit(resource.RLIMIT_CPU, (ends, ends + 5))

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            acts = event in _ACTS or event.startswith(("os.exec", "os.spawn", "socket.connect"))
            if acts or not all(one.startswith(self.allowed) for one in _changed(event, arguments)):
                extra["acts"].append(f"{event} {arguments!r}"[:200])
            elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
                writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if writes and not arguments[0].startswith((self.allowed, "/dev/", "/proc/self/")):
                    extra["acts"].append(f"writes {arguments[0]}"[:200])

        sys.addaudithook(watch)


_ACTS = {
    "os.system",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "urllib.Request",
    "webbrowser.open",
}
# Places of the paths that an event changes among its arguments, and of the descriptors of the folders they are in.
_CHANGES = {
    "shutil.rmtree": ((0, 1),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.chmod": ((0, 2),),
    "os.mkdir": ((0, 2),),
    "os.symlink": ((1, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
}


def _changed(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """Return the absolute paths of what an event changes; relative ones may be in the folder of a descriptor."""
    return [
        os.path.join(_folder_of(arguments[folder]), _path_of(arguments[path]))  # noqa: PTH118
        for path, folder in _CHANGES.get(event, ())
    ]


def _path_of(given: Any) -> str:
    return _folder_of(given) if isinstance(given, int) else os.fsdecode(given)


def _folder_of(descriptor: int | None) -> str:
    known = descriptor is not None and descriptor >= 0
    return os.readlink(f"/proc/self/fd/{descriptor}") if known else os.getcwd()  # noqa: PTH109, PTH115


# The other side -------------------------------------------------------------------------------------------------------


class Server:
    """Starts processes that have everything imported."""

    def __init__(self) -> None:
        # The server of some versions of Python ignores `sys.path`, and then silently imports nothing.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["campaign.child"])

    def start(
        self, words: Sequence[str], prepare: Prepare | None = None, environment: dict[str, str] | None = None
    ) -> "Running":
        """Start a command."""
        ours, theirs = self._context.Pipe(duplex=False)
        arguments = (list(words), theirs, prepare, environment or {})
        process = self._context.Process(target=run_command, args=arguments)
        process.start()
        theirs.close()
        return Running(process, ours)

    def run(
        self,
        words: Sequence[str],
        prepare: Prepare | None = None,
        environment: dict[str, str] | None = None,
        timeout: float = 600,
    ) -> Outcome:
        """Run a command to its end; one that takes longer than `timeout` seconds is killed."""
        return self.start(words, prepare, environment).wait(timeout)

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = 600) -> Any:
        """Call a function in a process of its own; None if it died."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=call, args=(function, arguments, theirs))
        process.start()
        theirs.close()
        return Running(process, ours).answer(timeout)


class Running:
    """A process that runs."""

    def __init__(self, process: Any, answer: Connection) -> None:
        self.process, self._answer = process, answer
        self._started = time.monotonic()

    def wait(self, timeout: float) -> Outcome:
        """Return how it ends; kill it after `timeout` seconds."""
        done = self.answer(timeout)
        if isinstance(done, Outcome):
            return done
        return Outcome(None, seconds=time.monotonic() - self._started, extra={"exit": self.process.exitcode})

    def answer(self, timeout: float) -> Any:
        """Return what the process sends, None if it ends without; kill it after `timeout` seconds."""
        got = None
        try:
            if self._answer.poll(timeout):
                got = self._answer.recv()
        except EOFError:
            pass
        if got is None:
            self.kill()
        self.process.join(30)
        return got

    def kill(self) -> None:
        """Kill it with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.kill()
        self.process.join(30)


def threads() -> int:
    """Return the number of threads of this process."""
    return max(threading.active_count(), len(os.listdir("/proc/self/task")))  # noqa: PTH208
