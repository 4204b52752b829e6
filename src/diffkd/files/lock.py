"""The lock of a run's folder: one run at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
"""Name of the file in the folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, making it if there is none; one that stays empty is removed again.

    The lock is the system's, which gives it up when the process ends, however it does: the file alone holds nobody up.
    Where nothing can be written, nothing is held.

    Args:
        folder: of the run.

    Raises:
        FileExistsError: if another process holds the folder; names it.
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
    except OSError:  # such as a folder that cannot be written: whatever writes there says so
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)
            lock.release()
            with suppress(OSError):  # where something was written
                for path in made:
                    path.rmdir()


def _owner(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace") or "of another process"
    return "of another process"
