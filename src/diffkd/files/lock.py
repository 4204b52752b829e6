"""File lock of a run's folder: one run at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
"""Name of the lock file in the folder."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; the folder is created if missing and removed again if it stays empty.

    This is a lock of the operating system, released when the process ends, also by a crash: the file alone does not
    block. If the folder is not writable, no lock is taken.

    Args:
        folder: the run's folder.

    Raises:
        FileExistsError: if another process holds the lock; the message names it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / LOCK
    lock = FileLock(file, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        file.write_text(f"pid {os.getpid()}, host {socket.gethostname()}", encoding="utf-8")
    except Timeout as error:
        raise FileExistsError(f"a run ({_owner(file)}) is working in {folder}; give another --out or wait") from error
    except OSError:  # such as a read-only folder: the first write there reports it
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)
            lock.release()
            with suppress(OSError):  # if the folder is not empty
                for path in made:
                    path.rmdir()


def _owner(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace") or "of another process"
    return "of another process"
