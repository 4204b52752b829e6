"""What the process does with the memory that tensors free."""

import os
import subprocess
import sys
import textwrap

import pytest

from diffkd.training.memory import keep_freed_memory

FAULTS = """
import resource, torch
from diffkd.training.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with keep_freed_memory():
    sizes = (3_000_000, 1_000_000, 2_000_000)
    rounds = []
    for _ in range(12):
        before = faults()
        kept = [torch.ones(size) for size in sizes]
        del kept
        rounds.append(faults() - before)
    print(min(rounds[4:]))  # a kernel that is short of memory takes pages back in some of them
"""


PAGES = 24_000_000 / os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def page_faults(**variables):
    """Page faults in the best of eight rounds, each of which makes and frees 24 MB: `PAGES` if all are given anew."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment | variables, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="concerns glibc")
def test_freed_memory_is_used_again_without_asking_the_kernel():
    # What is left differs with the kernels that fill the tensors, which allocate buffers of their own.
    assert page_faults() < PAGES / 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="concerns glibc")
def test_thresholds_that_the_environment_sets_are_kept():
    assert page_faults(MALLOC_MMAP_THRESHOLD_="65536") > 5000


def test_what_fails_within_gets_out():
    with pytest.raises(KeyError), keep_freed_memory():
        raise KeyError


def test_without_the_module_resource_as_on_windows():
    script = textwrap.dedent(
        """
        import os, sys
        sys.modules["resource"] = None
        for name in ("sched_getaffinity", "fork"):
            if hasattr(os, name):
                delattr(os, name)
        from pathlib import Path
        import torch
        import diffkd.commands.cli, diffkd.commands.compare, diffkd.commands.evaluate, diffkd.commands.export
        import diffkd.commands.plot, diffkd.data, diffkd.training.fit
        from diffkd.training import memory
        memory._STATUS = Path("nowhere")
        assert memory.peak_memory(torch.device("cpu")) == 0
        memory.reset_peak()
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
