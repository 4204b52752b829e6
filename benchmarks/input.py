"""Images per second from folders: this package's loader against torchvision's own, on JPEGs made on the spot.

    uv run python -m benchmarks.input --images 300 --workers 0

Times are the process's own, so that a busy machine does not count, where no worker processes share the work; the
median of several passes is reported, as benchmarks/results/input.json holds it.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from diffkd.data import ImageFolder
from diffkd.data.image_folder import IMAGENET_MEAN, IMAGENET_STD

RESULT = Path(__file__).parent / "results" / "input.json"


def make_folder(root: Path, images: int, size: tuple[int, int] = (500, 375)) -> None:
    """Write `images` JPEGs of two classes, smooth with some noise, as photographs compress; and two to evaluate on."""
    draw = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 2)):
        for index in range(count):
            folder = root / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int64)
            noisy = (smooth + draw.integers(-12, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{index}.jpg", quality=90)


def ours(root: Path, workers: int) -> Iterable[Any]:
    """Return this package's training batches."""
    return ImageFolder(root, batch_size=32, num_workers=workers).train_dataloader()


def plain(root: Path, workers: int) -> Iterable[Any]:
    """Return the batches that most training scripts make."""
    steps = [
        transforms.RandomResizedCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    data = torchvision.datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
    return DataLoader(data, 32, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def main() -> None:
    """Measure both, in turn, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--passes", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    clock: Callable[[], float] = time.perf_counter if given.workers else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), given.images)
        loaders = {"diffkd": ours(Path(folder), given.workers), "torchvision": plain(Path(folder), given.workers)}
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(given.passes + 1):  # the first one starts the workers and fills the caches
            for name, loader in loaders.items():
                start = clock()
                count = sum(len(batch[1]) for batch in loader)
                rates[name].append(count / (clock() - start))
    result = {
        "what": "images per second, 500x375 JPEG to 224x224, random resized crop and flip, batches of 32",
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
        "clock": "wall" if given.workers else "the process's own",
        "images": given.images,
        "n": given.passes,
        "workers": given.workers,
        "median": {name: round(statistics.median(values[1:]), 1) for name, values in rates.items()},
        "all": {name: [round(value, 1) for value in values[1:]] for name, values in rates.items()},
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["median"]))


if __name__ == "__main__":
    main()
