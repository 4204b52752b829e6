"""Images per second from folders: this package's loader against torchvision's own, on JPEGs made on the spot.

    uv run python -m benchmarks.input --images 300 --workers 0

Without worker processes the clock is the process's own, so that a busy machine does not count.
"""

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.at_least_one import at_least_one
from benchmarks.report import RESULTS, machine, save, table, with_quartiles
from benchmarks.timing import ratios, spread, take_turns
from diffkd.data import ImageFolder
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD


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


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Let both read all images in turn, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=at_least_one, default=300)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=at_least_one, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    clock = "wall" if chosen.workers else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), chosen.images)
        loaders = {"diffkd": ours(Path(folder), chosen.workers), "torchvision": plain(Path(folder), chosen.workers)}
        runs = {name: lambda loader=loader: sum(len(batch[1]) for batch in loader) for name, loader in loaders.items()}
        # The first round starts the workers and fills the caches.
        times = take_turns(runs, chosen.rounds, warm_up=1, device="cpu", clock=clock)
    rates = {name: asdict(spread([chosen.images / one for one in seconds])) for name, seconds in times.items()}
    over = asdict(ratios(times, "torchvision")["diffkd"])
    record = {
        "what": "images per second, 500x375 JPEG to 224x224, random resized crop and flip, batches of 32",
        "machine": machine("cpu"),
        "clock": clock,
        "images": chosen.images,
        "workers": chosen.workers,
        "rounds": chosen.rounds,
        "images_per_second": rates,
        "time_over_torchvision": over,
    }
    save(chosen.out, "input", record)
    rows = [(name, with_quartiles(facts, 1)) for name, facts in rates.items()]
    print(table([("loader", "images per second"), *rows]))
    print(f"time of diffkd over torchvision: {with_quartiles(over, 2)}, n = {chosen.rounds}")
    return record


if __name__ == "__main__":
    main()
