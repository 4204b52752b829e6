"""What all tests share: one thread and a fixed seed, which `DIFFKD_TEST_SEED` changes where a test sets none itself."""

import os

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: results depend on the number of threads

# The first example may import half of torch, and a test that fails must fail again.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(int(os.environ.get("DIFFKD_TEST_SEED", "0")))
