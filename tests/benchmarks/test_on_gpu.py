"""The list of what wants a GPU: its order, its time limit, and that it goes on where it was."""

import sys
import time

import numpy as np
import pytest
from benchmarks.on_gpu import GRACE, Task, main, tasks, work_through


def noting(folder, word, seconds=0.0):
    """Write a module that notes a word once it has slept, or that it was interrupted."""
    code = (
        "import time, pathlib, signal\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"log = pathlib.Path({str(folder / 'log.txt')!r})\n"
        f"try:\n    time.sleep({seconds})\n    said = {word!r}\nexcept KeyboardInterrupt:\n    said = 'saved'\n"
        "log.open('a').write(said + '\\n')\n"
        "raise SystemExit(said == 'saved')\n"
    )
    (folder / f"noting_{word}.py").write_text(code)
    return Task(word, (f"noting_{word}",))


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda: (tmp_path / "log.txt").read_text().split()


def test_a_second_call_begins_where_the_first_was_interrupted(tmp_path, written, monkeypatch):
    monkeypatch.setattr("benchmarks.on_gpu.LEAST", 0.0)
    first, endless, last = noting(tmp_path, "first"), noting(tmp_path, "long", 60.0), noting(tmp_path, "last")
    begun = time.monotonic()
    rows = work_through([first, endless, last], tmp_path / "out", GRACE + 3)
    assert [state for _, state, _ in rows] == ["done", "interrupted", "not begun"]
    assert written() == ["first", "saved"]
    assert time.monotonic() - begun < GRACE + 3
    noting(tmp_path, "long")  # nothing is left of it but a moment
    rows = work_through([first, endless, last], tmp_path / "out", GRACE + 30)
    assert [state for _, state, _ in rows] == ["done before", "done", "done"]
    assert written() == ["first", "saved", "long", "last"]


def test_what_failed_is_tried_again_and_what_needs_it_waits(tmp_path, written):
    broken = Task("broken", ("no_such_module_at_all",))
    after = Task("after", noting(tmp_path, "after").words, needs=("broken",))
    rows = work_through([broken, after], tmp_path / "out", GRACE + 60)
    assert [state for _, state, _ in rows] == ["failed", "waits"]
    assert "no_such_module_at_all" in (tmp_path / "out" / "logs" / "broken.txt").read_text()
    noting(tmp_path, "mended")
    rows = work_through([Task("broken", ("noting_mended",)), after], tmp_path / "out", GRACE + 60)
    assert [state for _, state, _ in rows] == ["done", "done"]


def test_the_list_begins_with_the_price_of_a_step_and_trains_the_teacher_before_its_students(tmp_path):
    names = [task.name for task in tasks(tmp_path, tmp_path / "out", "cuda", 4, small=False)]
    assert names[0] == "cifar-eager"
    assert names.index("teacher") < names.index("compare-1") < names.index("compare-3")
    assert len(set(names)) == len(names)


def test_a_folder_without_cifar_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "train.npz", images=np.zeros((1, 4, 4, 3), np.uint8), labels=np.zeros(1, int))
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert "test.npz" in error
    assert "train.npz" not in error.rpartition("error")[2]
    assert sys.executable not in error
