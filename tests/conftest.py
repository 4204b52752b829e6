"""What all tests share: one thread, a fixed seed, and the sibling modules of this folder on the path."""

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)

# The first example may import half of torch, and a test that fails must fail again.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
