"""Hostile files: nothing in them runs, nothing is written elsewhere, memory is bounded, and one clear line is said.

`DIFFKD_FILES` is the number of files of each kind that are tried, spread evenly over all (all by default).
"""

import shutil
import time
from pathlib import Path

import pytest
from campaign.child import Contained, Outcome, Server
from campaign.hostile import CANARY, cases
from campaign.runs import count

MEMORY = 2 * 2**30
"""Bytes of address space that a command may take beyond what it has when it starts."""
RESIDENT = 2**30
"""Bytes of memory that it may really use."""
SECONDS = 60
"""Of CPU time."""
LONGEST = 1500
"""Characters of a line of an error."""


def problems(done: Outcome, folder: Path) -> list[str]:
    """Return what is wrong with how a command ended."""
    found = []
    if done.code not in (0, 1, 2):
        found.append(f"ended with {done.code} {done.extra.get('exit', '')} after {done.seconds:.0f} s")
    if done.extra.get("acts"):
        found.append(f"did {done.extra['acts'][:3]}")
    if list(folder.rglob(CANARY)) or list(folder.rglob(CANARY.upper())):
        found.append("ran the payload")
    if done.code in (1, 2) and len(done.lines) != 1:
        found.append(f"said {len(done.lines)} lines")
    if "Traceback" in done.err:
        found.append("printed a traceback")
    wrong = {one for one in done.err + done.out if not one.isprintable() and one != "\n"}
    if wrong:
        found.append(f"printed {wrong}")
    if (longest := max((len(line) for line in done.lines), default=0)) > LONGEST:
        found.append(f"printed a line of {longest} characters")
    grown = done.peak[0] - done.peak[1]
    if grown > RESIDENT:
        found.append(f"took {grown / 2**20:.0f} MiB")
    return found


@pytest.fixture(scope="module")
def server():
    return Server()


CASES = cases()
KINDS = list(dict.fromkeys(name.partition(":")[0] for name in CASES))


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files(kind, server, tmp_path, record_property):
    started = time.monotonic()
    found = [(name, case) for name, case in CASES.items() if name.partition(":")[0] == kind]
    wanted = min(count("DIFFKD_FILES", len(found)), len(found))
    chosen = [found[index * len(found) // wanted] for index in range(wanted)]
    failed: dict[str, list[str]] = {}
    read, most, size = 0, 0, 0
    for number, (name, make) in enumerate(chosen):
        folder = tmp_path / str(number)
        folder.mkdir()
        words = make(folder)
        size += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        done = server.run(words, Contained(str(folder), MEMORY, SECONDS), timeout=3 * SECONDS)
        read += done.code == 0
        most = max(most, done.peak[0] - done.peak[1])
        if wrong := problems(done, folder):
            failed[name] = [*wrong, done.err[-600:]]
            print(f"\n{name}: {failed[name]}", flush=True)  # noqa: T201
        shutil.rmtree(folder)
    record_property(
        "campaign",
        f"| hostile files, {kind} | {len(chosen)} files, {size / 2**20:,.1f} MiB | {read} usable, the others refused "
        f"in one line; at most {most / 2**20:.0f} MiB more; {len(failed)} not | {time.monotonic() - started:.0f} |",
    )
    assert not failed, "\n".join(f"{name}: {wrong}" for name, wrong in failed.items())
