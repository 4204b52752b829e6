"""One process that trains, resumes, measures, exports and reads for an hour: memory, open files and threads stay level.

`DIFFKD_SOAK_MINUTES` is how long (60).
"""

import contextlib
import gc
import io
import os
import resource
import shutil
import time
import warnings
from pathlib import Path

from campaign.child import main, threads
from campaign.hostile import cases
from campaign.runs import TASKS, count, write_recipe

GROWTH = 48 * 2**20
"""Bytes that the memory may grow by between the first third and the end: what an allocator keeps varies by some."""


def _measure() -> tuple[int, int, int]:
    """Return resident bytes, open files and threads of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize(), len(os.listdir("/proc/self/fd")), threads()  # noqa: PTH208


def _run(words: list[str]) -> int:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main(words)


def test_soak(tmp_path, record_property):
    minutes = count("DIFFKD_SOAK_MINUTES", 60)
    recipes = {task: write_recipe(task, tmp_path / task) for task in TASKS}
    hostile = [case for name, case in cases().items() if name.startswith(("safetensors: a", "shards", "pickle: os"))]
    trust = [word for recipe in recipes.values() for word in recipe.words if word.startswith("--trust")]
    started = time.monotonic()
    rows: list[tuple[int, int, int]] = []
    while time.monotonic() - started < 60 * minutes or len(rows) < 4:
        number = len(rows)
        out = tmp_path / "out"
        task = TASKS[number % len(TASKS)]
        recipe = recipes[task]
        assert _run(recipe.fit(out, "--max_steps=3")) == 0
        shutil.rmtree(out)
        assert _run(recipe.fit(out)) == 0
        assert _run(["test", str(out), "--accelerator=cpu", *trust]) == 0
        assert _run(["export", str(out), f"--out={tmp_path / 'student.safetensors'}"]) == 0
        assert _run(["inspect", str(out)]) == 0
        for _ in range(5):
            evil = tmp_path / "evil"
            evil.mkdir()
            assert _run(hostile[number % len(hostile)](evil)) in (0, 1)
            shutil.rmtree(evil)
        shutil.rmtree(out)
        if number % len(TASKS) == len(TASKS) - 1 or not rows:
            print(number, _measure(), flush=True)  # noqa: T201
        rows.append(_measure())
    # Each task comes once in three rounds; the first rounds import and allocate.
    early = rows[len(rows) // 3 // 3 * 3 :][:3]
    late = rows[-3:]
    grown = max(row[0] for row in late) - max(row[0] for row in early)
    files, tasks = (tuple(max(row[column] for row in part) for part in (early, late)) for column in (1, 2))
    record_property(
        "campaign",
        f"| soak of {minutes} minutes: train, test, export, inspect, hostile files | {len(rows)} rounds | memory "
        f"{max(row[0] for row in early) / 2**20:.0f} to {max(row[0] for row in late) / 2**20:.0f} MiB, open files "
        f"{files[0]} to {files[1]}, threads {tasks[0]} to {tasks[1]} | {time.monotonic() - started:.0f} |",
    )
    assert grown <= GROWTH, rows
    assert files[1] <= files[0], rows
    assert tasks[1] <= tasks[0], rows
