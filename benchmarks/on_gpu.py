"""Everything that wants a GPU, in order of worth, until the time is up; called again, it goes on.

    bash benchmarks/on_gpu.sh DATA --out FOLDER               # nine minutes; DATA holds CIFAR-100's train.npz, test.npz
    uv run python -m benchmarks.on_gpu DATA --out FOLDER --small --device cpu      # the same in miniature

A task that was finished leaves FOLDER/done/NAME and is skipped afterwards. One that the time ended is interrupted, as
by Ctrl-C: a training saves a checkpoint then and goes on from it. Logs are in FOLDER/logs; bring the whole folder back.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE = 25.0  # seconds for an interrupted training to save
LEAST = 20.0  # seconds below which no step is begun


@dataclass(frozen=True)
class Task:
    """One entry of the list.

    Attributes:
        name: of its mark and log.
        words: its command, without the interpreter.
        needs: names of the tasks whose results it reads.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()


def tasks(data: Path, out: Path, device: str, jobs: int, *, small: bool) -> list[Task]:
    """Return what is to be measured, the worthiest first.

    Args:
        data: folder of CIFAR-100.
        out: of all results.
        device: "cuda" or "cpu".
        jobs: trainings at the same time.
        small: tiny batches, few steps: to see that all of it runs.
    """
    price = ["--device", device, "--out", str(out / "step"), "--rounds", "2" if small else "31"]
    price += ["--small"] if small else []
    contestants = ["--contestants", "alone", "kd", "fitnet", "diffkd", "direct", "plain"]
    arrays = ["--data", "diffkd.data.Arrays", f"--data.train={data / 'train.npz'}", f"--data.test={data / 'test.npz'}"]
    arrays += ["--data.batch_size=256", f"--accelerator={'gpu' if device == 'cuda' else 'cpu'}", "--progress=false"]
    long = ["--epochs=1", "--max_steps=2"] if small else ["--epochs=60"]
    quick = [] if small else ["--precision=bf16-mixed", "--compile=reduce-overhead"]
    # Strategy A1 in a quarter of its epochs, with the learning rate for batches of 256.
    schedule = ["--optimizer.lr=0.2", "--schedule.kind=cosine", "--schedule.warmup_epochs=1", "--schedule.per=step"]
    lengths = ["--rounds", "3", "--lengths", "1024"] if small else ["--rounds", "31"]
    teacher = out / "teacher"

    def step(name: str, case: str, *more: str) -> Task:
        words = ["benchmarks.step", "--case", case, *contestants, *price, *more, "--name", name]
        return Task(name, tuple(words))

    def versus(seeds: int) -> Task:
        words = ["diffkd", "compare", "cifar100/resnet56-resnet20", "--methods", "alone", "kd", "dist"]
        words += ["fitnet-direct-standardized", "diffkd", "diffkd-direct", "--seeds", str(seeds), "--jobs", str(jobs)]
        words += ["--cost", "false", "--out", str(out / "compare"), "--", *arrays, *long, *quick, *schedule]
        return Task(f"compare-{seeds}", (*words, f"--teacher_weights={teacher}"), needs=("teacher",))

    fit = ["diffkd", "fit", "cifar100/teacher", f"--out={teacher}", "--resume=true", *arrays, *long, *quick, *schedule]
    bf16 = ["--precision", "bf16", "--batch", "2" if small else "128"]
    return [
        step("cifar-eager", "cifar"),
        Task("teacher", tuple(fit)),
        step("cifar-graphs", "cifar", "--compile", "default" if small else "reduce-overhead"),
        versus(1),
        step("imagenet224-bf16-eager", "imagenet224", *bf16),
        versus(3),
        step("cifar-compiled", "cifar", "--compile"),
        step("imagenet-eager", "imagenet"),
        step("imagenet224-bf16-graphs", "imagenet224", *bf16, "--compile", "default" if small else "reduce-overhead"),
        Task("dense", ("benchmarks.step", "--case", "fpn", "segmentation", *price, "--name", "dense")),
        Task(
            "attention", ("benchmarks.attention", "time", "--device", device, "--out", str(out / "attention"), *lengths)
        ),
        Task("growth", ("benchmarks.growth", "--device", device, "--clock", "wall", "--out", str(out / "growth"))),
    ]


def work_through(todo: Sequence[Task], out: Path, seconds: float) -> list[tuple[str, str, float]]:
    """Run what is not done yet, one after another, until the time is up.

    Args:
        todo: the list.
        out: folder of marks and logs.
        seconds: from now on, saving included.

    Returns:
        (name, "done" | "done before" | "interrupted" | "not begun" | "failed" | "waits", seconds) of each.
    """
    end = time.monotonic() + seconds
    for folder in (out / "done", out / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for task in todo:
        mark = out / "done" / task.name
        begun = time.monotonic()
        if mark.is_file():
            state = "done before"
        elif not all((out / "done" / other).is_file() for other in task.needs):
            state = "waits"
        elif end - begun < LEAST + GRACE:
            state = "not begun"
        else:
            state = _run(task, out / "logs" / f"{task.name}.txt", end - begun - GRACE)
            if state == "done":
                mark.touch()
        rows.append((task.name, state, time.monotonic() - begun))
        print(f"{task.name:26} {state:12} {rows[-1][2]:6.1f} s", flush=True)
    return rows


def _run(task: Task, log: Path, seconds: float) -> str:
    """Run a command in a process group of its own, and interrupt the group when the time is up."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"+ python -m {' '.join(task.words)}\n")
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", *task.words], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # not SIGINT, which is ignored below a shell's background jobs
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE - 2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what is left over, its children too
        process.wait()
        return "interrupted"


def main(words: Sequence[str] | None = None) -> int:
    """Work through the list, and return 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with CIFAR-100 as train.npz and test.npz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--jobs", type=int, default=4, help="trainings at the same time")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="few steps of tiny batches: to see that it runs")
    given = parser.parse_args(words)
    missing = [str(given.data / name) for name in ("train.npz", "test.npz") if not (given.data / name).is_file()]
    if missing:
        parser.error(f"there is no {' and no '.join(missing)}: give the folder with both")
    todo = tasks(given.data.resolve(), given.out.resolve(), given.device, given.jobs, small=given.small)
    rows = work_through(todo, given.out.resolve(), 60 * given.minutes)
    lines = ["| task | state | seconds |", "| --- | --- | --- |"]
    lines += [f"| {name} | {state} | {seconds:.0f} |" for name, state, seconds in rows]
    with (given.out / "course.md").open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")
    return int(any(state == "failed" for _, state, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
