"""What all tests share: one thread, a seed, and small images in files for whole trainings in seconds.

`DIFFKD_TEST_SEED` changes the seed where a test sets none itself.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
multiprocessing.set_forkserver_preload(["diffkd.commands.compare", "torch.distributed"])  # when the first one is forked
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: results depend on the number of threads

# The first example may import half of torch, and a test that fails must fail again.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("tests")

CLASSES = 6


@pytest.fixture(autouse=True, scope="module")
def _exempt_imports_from_garbage_collection() -> None:
    """Exempt what is alive by now: every training collects garbage, and the imports alone are a million objects."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter collect everything when it ends, as libraries count what they leak."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def short_comparisons() -> Iterator[None]:
    """Fork the processes of comparisons and studies from the server that has the imports done; time steps once.

    Commands that tests start as such begin their processes anew, as users do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffkd.commands.compare.START_METHOD", "forkserver")
        patch.setattr("diffkd.commands.tune.START_METHOD", "forkserver")
        patch.setattr("diffkd.commands.compare.ROUNDS", 1)
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(int(os.environ.get("DIFFKD_TEST_SEED", "0")))


@pytest.fixture(scope="session")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two .npz files of 8x8 images in six classes, told apart by brightness, with noise."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    files = {}
    for name, count in (("train", 60), ("test", 36)):
        labels = np.arange(count) % CLASSES
        bright = labels[:, None, None, None] * 30
        images = (draw.integers(0, 60, (count, 8, 8, 3)) + bright).astype(np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
        files[name] = str(folder / f"{name}.npz")
    return files


@pytest.fixture(scope="session")
def model_file() -> str:
    """The file whose functions build the models of these tests."""
    return str(Path(__file__).parent / "tiny_models.py")


@pytest.fixture
def named_files(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Write files of 8x8 images whose classes have names, over those of an earlier call."""

    def write(names: Sequence[str], count: int = 60, shift: int = 0) -> dict[str, str]:
        files = {"train": str(tmp_path / "train.npz"), "test": str(tmp_path / "test.npz")}
        for file, images in zip(files.values(), (count, 36), strict=True):
            pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
            np.savez(file, images=pixels, labels=(np.arange(images) + shift) % len(names), classes=np.array(names))
        return files

    return write
