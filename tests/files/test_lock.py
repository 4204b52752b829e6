"""Two runs do not write into one folder at once."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
from short_trainings import arrays, train

from diffkd.files import lock
from diffkd.files.lock import lock_folder

# Holds a folder, as does a worker process that it forks.
HOLDER = """
import os, runpy, sys, time
from pathlib import Path
with runpy.run_path(sys.argv[1])["lock_folder"](Path(sys.argv[2])):
    worker = os.fork()
    if worker:
        print(os.getpid(), worker, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path) -> Iterator[int]:
    """Return the process id of a process that holds tmp_path / "run"."""
    words = [sys.executable, "-c", HOLDER, lock.__file__, str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        yield pids[0]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, image_files, model_file, holder):
    folder = tmp_path / "run"
    for resume in (False, True):
        with pytest.raises(
            FileExistsError, match=rf"a run \(pid {holder}, host .+\) is working in {re.escape(str(folder))}"
        ):
            train(arrays(image_files), folder, model_file, resume=resume)
    assert [path.name for path in folder.iterdir()] == [lock.LOCK]
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (folder / lock.LOCK).exists()
    assert train(arrays(image_files), folder, model_file, epochs=1)["last"]["epoch"] == 1
    assert not (folder / lock.LOCK).exists()


def test_what_is_refused_leaves_nothing(tmp_path, image_files):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(arrays(image_files), tmp_path / "deep" / "run", "nowhere.py")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_not_held(tmp_path):
    tmp_path.chmod(0o500)
    with lock_folder(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_one_process_holds_a_folder_again_and_again(tmp_path):
    for _ in range(2):
        with lock_folder(tmp_path):
            assert str(os.getpid()) in (tmp_path / lock.LOCK).read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == []
