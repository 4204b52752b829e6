"""Runs that are killed at any moment: nothing is lost beyond the last checkpoint, and they end with the same bits.

`DIFFKD_KILLS` is the number of kills for each task (50), `DIFFKD_COMPARE_KILLS` that of comparisons, `DIFFKD_SEED` the
seed of their moments.
"""

import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from campaign.child import STEPS, Server
from campaign.runs import TASKS, Recipe, count, partial_files, same_runs, saved_step, whole_files, write_recipe

KILLS = count("DIFFKD_KILLS", 50)
SEED = count("DIFFKD_SEED", 0)


@dataclass
class KilledAtFile:
    """The process kills itself when it opens or renames the n-th file in a folder."""

    folder: str
    number: int

    def __call__(self, extra: dict[str, Any]) -> None:
        """Watch the process."""
        self.seen = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in ("open", "os.rename") or not str(arguments[0]).startswith(self.folder):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            self.seen += 1
            if self.seen == self.number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)


@pytest.mark.parametrize("task", TASKS)
def test_runs(task, tmp_path, record_property):
    started, server, draw = time.monotonic(), Server(), random.Random(SEED)
    recipe = write_recipe(task, tmp_path / "recipe")
    whole = tmp_path / "whole"
    usual = server.run(recipe.fit(whole))
    assert usual.code == 0, usual.err
    steps = tmp_path / "steps"
    kills = at_files = finished = most_lost = most_partial = 0
    number, folder = 0, tmp_path / "0"
    while kills < KILLS:
        before = saved_step(folder)
        steps.write_bytes(b"")
        # Every other kill is at one of the about thirty files that a run opens or renames, the others at any moment.
        prepare = KilledAtFile(str(folder), draw.randint(1, 30)) if kills % 2 else None
        running = server.start(recipe.fit(folder), prepare, {STEPS: str(steps)})
        if prepare is None:
            running.process.join(draw.uniform(0, 1.1 * usual.seconds))
            running.kill()
        done = running.wait(120)
        assert done.code in (None, 0), (done.code, done.err)
        whole_files(folder)
        if done.code is None:
            kills += 1
            at_files += prepare is not None
            lost = before + len(steps.read_bytes()) - saved_step(folder)
            assert lost <= recipe.every, f"{lost} steps lost of {folder}"
            most_lost = max(most_lost, lost)
            most_partial = max(most_partial, len(partial_files(folder)))
        if (folder / "result.json").is_file():
            finished += 1
            same_runs(folder, whole)
            assert server.run(recipe.fit(folder)).code == 0  # trains nothing, but removes and writes what is left
            assert partial_files(folder) == []
            number += 1
            folder = tmp_path / str(number)
    last = server.run(recipe.fit(folder))
    assert last.code == 0, last.err
    same_runs(folder, whole)
    assert partial_files(folder) == []
    record_property(
        "campaign",
        f"| {task}: `kill -9`, then `--resume` | {kills} kills, {at_files} of them at a file | {finished + 1} runs "
        f"bit-identical, at most {most_lost} steps lost (saved every {recipe.every}), no half file | "
        f"{time.monotonic() - started:.0f} |",
    )


def _compare(recipe: Recipe, out: Path) -> list[str]:
    words = [f"--out={out}", "--methods", "alone", "diffkd", "--seeds", "2", "--jobs", "2", "--cost", "false"]
    trust = [word for word in recipe.words if word.startswith("--trust")]
    options = [word for word in recipe.words if not word.startswith("--trust")]
    return ["compare", str(recipe.file), *words, *trust, "--", *options]


def test_comparisons(tmp_path, record_property):
    """The whole group is killed, as when the power fails, or the comparison alone, or one of its runs."""
    started, server, draw = time.monotonic(), Server(), random.Random(SEED)
    wanted = count("DIFFKD_COMPARE_KILLS", KILLS)
    recipe = write_recipe("classification", tmp_path / "recipe")
    whole, folder = tmp_path / "whole", tmp_path / "0"
    usual = server.run(_compare(recipe, whole))
    assert usual.code == 0, usual.err
    kills, finished, number = dict.fromkeys(("group", "parent", "run"), 0), 0, 0
    runs = [f"{method}/seed-{seed}" for method in ("alone", "diffkd") for seed in (0, 1)]
    while sum(kills.values()) < wanted:
        running = server.start(_compare(recipe, folder))
        running.process.join(draw.uniform(0.2, 1.1) * usual.seconds)
        kind = ("group", "parent", "run")[sum(kills.values()) % 3]
        workers = _children(running.process.pid)
        if kind == "group":
            running.kill()
        elif kind == "parent":
            running.process.kill()
        elif workers:
            os.kill(draw.choice(workers), signal.SIGKILL)
        done = running.wait(120)
        if kind == "parent":
            _wait_for_end(workers)
        for name in runs:
            whole_files(folder / name)
        if kind == "run" and done.code == 1:
            assert len(done.lines) >= 1
            assert "goes on with it" in done.lines[-1], done.err
        else:
            assert done.code in (None, 0), done.err
        kills[kind] += done.code != 0
        if (folder / "comparison.md").is_file() and done.code == 0:
            finished += 1
            for name in runs:
                same_runs(folder / name, whole / name)
            number += 1
            folder = tmp_path / str(number)
    last = server.run(_compare(recipe, folder))
    assert last.code == 0, last.err
    for name in runs:
        same_runs(folder / name, whole / name)
        assert partial_files(folder / name) == []
    record_property(
        "campaign",
        f"| `compare` with two jobs: `kill -9` of all, of the parent, of a run | {kills['group']} + {kills['parent']} "
        f"+ {kills['run']} kills | {finished + 1} comparisons of 4 runs bit-identical, no half file | "
        f"{time.monotonic() - started:.0f} |",
    )


def _children(pid: int) -> list[int]:
    """Return the processes that a process has started to train in."""
    found = []
    for task in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((task / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[1])
            words = (task / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and b"spawn_main" in words:
            found.append(int(task.name))
    return found


def _wait_for_end(pids: list[int], seconds: float = 60) -> None:
    """Wait until processes whose parent was killed have ended by themselves."""
    ends = time.monotonic() + seconds
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < ends, f"{left} go on without the comparison"
        time.sleep(0.2)
