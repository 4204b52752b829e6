"""One run at a time in a folder."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # as on Windows
    fcntl = None

LOCK = ".lock"
"""Name of the file in the folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, making it if there is none; one that stays empty is removed again.

    The lock is the system's, which gives it up when the process ends, however it does: the file alone holds nobody up.
    Where the system has no such locks, or nothing can be written, nothing is held.

    Args:
        folder: of the run.

    Raises:
        FileExistsError: if another process holds the folder; names it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        handle = None if fcntl is None else _locked(folder)
    except BlockingIOError as error:
        raise FileExistsError(f"a run ({_owner(folder)}) is working in {folder}; give another --out or wait") from error
    except OSError:
        handle = None
    try:
        yield
    finally:
        if handle is not None:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(handle)
            with suppress(OSError):  # where something was written
                for path in made:
                    path.rmdir()


def _locked(folder: Path) -> int:
    """Return the descriptor of the folder's file, locked.

    The lock is of the kind that belongs to the process: workers that are forked do not keep it when that is killed.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # removed by whoever held it until now
                if os.path.samestat(os.fstat(handle), (folder / LOCK).stat()):
                    os.truncate(handle, 0)
                    os.write(handle, f"pid {os.getpid()}, host {socket.gethostname()}".encode())
                    return handle
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def _owner(folder: Path) -> str:
    with suppress(OSError):
        return (folder / LOCK).read_text(encoding="utf-8", errors="replace") or "of another process"
    return "of another process"
