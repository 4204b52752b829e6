"""Runs whose disk is full, read-only or gone: one clear line, nothing earlier is lost, and they go on afterwards.

`DIFFKD_WRITES` limits the number of writes at which the disk becomes full (all of them by default).
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from campaign.child import FullDisk, Outcome, Removed, Server, Unprivileged
from campaign.runs import TASKS, count, partial_files, same_runs, same_students, saved_step, whole_files, write_recipe

WRITES = count("DIFFKD_WRITES", 1000)


def one_line(done: Outcome, *parts: str) -> None:
    """Assert that a command failed with one clear line."""
    assert done.code == 1, (done.code, done.err)
    assert len(done.lines) == 1, done.err
    assert done.lines[0].startswith("diffkd: "), done.err
    for part in parts:
        assert part in done.lines[0], (part, done.err)


@pytest.mark.parametrize("task", TASKS)
def test_full_at_every_write(task, tmp_path, record_property):
    started, server = time.monotonic(), Server()
    recipe = write_recipe(task, tmp_path / "recipe")
    whole = tmp_path / "whole"
    usual = server.run(recipe.fit(whole), FullDisk(str(whole), 0))
    assert usual.code == 0, usual.err
    writes = usual.extra["writes"]
    tried, lost = 0, 0
    for number in list(range(1, len(writes) + 1))[:WRITES]:
        folder = tmp_path / str(number)
        done = server.run(recipe.fit(folder), FullDisk(str(folder), number))
        if "report.html" in writes[number - 1]:
            assert done.code == 0, done.err  # the run is finished without its page
        else:
            one_line(done, str(folder))
        whole_files(folder)
        assert [name for name in partial_files(folder) if name != ".lock"] == []
        saved = saved_step(folder)
        done = server.run(recipe.fit(folder))
        assert done.code == 0, done.err
        same_runs(folder, whole)
        tried += 1
        lost = max(lost, recipe.steps - saved)
        shutil.rmtree(folder)
    record_property(
        "campaign",
        f"| {task}: disk full from the n-th file on, then space again | all n of {len(writes)}, {tried} tried | one "
        f"line each, earlier files whole, resumed bit-identical | {time.monotonic() - started:.0f} |",
    )


def test_a_small_file_system(tmp_path, record_property):
    """A file system of its own that really runs full."""
    started, server = time.monotonic(), Server()
    recipe = write_recipe("detection", tmp_path / "recipe")
    whole, disk = tmp_path / "whole", tmp_path / "disk"
    assert server.run(recipe.fit(whole)).code == 0
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        # Room for one checkpoint of 6 MB, and not for the next one beside it.
        done = server.run(recipe.fit(disk / "run"))
        one_line(done, "last.ckpt", "No space left")
        whole_files(disk / "run")
        saved = saved_step(disk / "run")
        assert saved == recipe.every
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        done = server.run(recipe.fit(disk / "run"))
        assert done.code == 0, done.err
        same_runs(disk / "run", whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    record_property(
        "campaign",
        f"| a file system of 9 MB that runs full, then is enlarged | 1 run | one line, {saved} steps kept, resumed "
        f"bit-identical | {time.monotonic() - started:.0f} |",
    )


def test_a_folder_that_may_not_be_written(tmp_path, record_property):
    started, server = time.monotonic(), Server()
    recipe = write_recipe("classification", tmp_path / "recipe")
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    done = server.run(recipe.fit(shut / "run"), Unprivileged())
    one_line(done, str(shut))
    assert list(shut.iterdir()) == []
    # A run that has begun, and then its folder is closed: every file is as it was.
    run = tmp_path / "run"
    assert server.run(recipe.fit(run, "--max_steps=7")).code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    done = server.run(["test", str(run), "--accelerator=cpu", *_trust(recipe)], Unprivileged())
    assert done.code == 0, done.err  # measuring writes nothing
    done = server.run(["export", str(run), "--out", str(shut / "student.safetensors")], Unprivileged())
    one_line(done, str(shut))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    record_property(
        "campaign",
        f"| a folder that may not be written, for `fit`, `test` and `export` | 3 commands | one line, nothing changed; "
        f"`test` measures | {time.monotonic() - started:.0f} |",
    )


def _trust(recipe) -> list[str]:
    return [word for word in recipe.words if word.startswith("--trust")]


@pytest.mark.parametrize("task", TASKS)
def test_the_folder_is_removed(task, tmp_path, record_property):
    """The run writes its folder anew, with all that it knows, and can be resumed from there."""
    started, server = time.monotonic(), Server()
    recipe = write_recipe(task, tmp_path / "recipe")
    whole = tmp_path / "whole"
    usual = server.run(recipe.fit(whole))
    assert usual.code == 0, usual.err
    for step in range(1, recipe.steps + 1):
        folder = tmp_path / str(step)
        done = server.run(recipe.fit(folder), Removed(str(folder), step))
        assert done.code == 0, done.err
        assert "was removed" in done.err, done.err
        assert done.lines == [], done.err
        whole_files(folder)
        same_students(folder, whole)
        assert (folder / "config.yaml").read_bytes().replace(os.fsencode(folder), b"") == (
            whole / "config.yaml"
        ).read_bytes().replace(os.fsencode(whole), b"")
        assert partial_files(folder) == []
    record_property(
        "campaign",
        f"| {task}: the folder is removed while the run works in it | at each of {recipe.steps} steps | one warning, "
        f"the run is written anew and ends bit-identical | {time.monotonic() - started:.0f} |",
    )


def test_the_lock_outlives_nothing(tmp_path):
    """A lock file that a killed run leaves is no obstacle."""
    server = Server()
    recipe = write_recipe("classification", tmp_path / "recipe")
    folder = tmp_path / "run"
    folder.mkdir()
    Path(folder, ".lock").write_text("pid 1, host elsewhere", encoding="utf-8")
    assert server.run(recipe.fit(folder)).code == 0
