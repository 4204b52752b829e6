"""Fashion-MNIST: 60,000 training and 10,000 test images, 28x28 grey, ten classes; and the packaged subset."""

import gzip
import io
import math
import struct
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffkd.data.classification.arrays import check_unpacked
from diffkd.data.classification.augmentation import Augmentation
from diffkd.data.classification.in_memory import ImageSet, InMemory, InMemoryData, check_image_set
from diffkd.data.image_data import train_or_val
from diffkd.data.seeding import mix_seed


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read an IDX file of unsigned bytes, uncompressed or gzipped.

    Args:
        path: the file; a name ending in `.gz` means gzipped.
        ndim: number of dimensions the file must have: 3 for images, 1 for labels.

    Returns:
        uint8 tensor of the shape that the file states.

    Raises:
        ValueError: if the file is not IDX, has another number of dimensions, or is shorter or longer than it states;
            names the file.
        OSError: if the file cannot be opened.
    """
    mend = "fetch the file again"
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            header = file.read(4 + 4 * ndim)
            if header[:4] != bytes([0, 0, 8, ndim]):
                raise ValueError(
                    f"{path}: not an IDX file of bytes in {ndim} dimension(s), it begins {header[:4]!r}; {mend}."
                )
            shape = struct.unpack(f">{ndim}I", header[4:])
            check_unpacked(math.prod(shape), path)
            content = file.read(math.prod(shape) + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error, struct.error, MemoryError) as error:
            raise ValueError(f"{path}: truncated or damaged ({error!r}); {mend}.") from error
    if len(content) != math.prod(shape):
        raise ValueError(f"{path}: states {math.prod(shape)} bytes {shape}, holds {len(content)} or more; {mend}.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)


CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MEAN = (0.28604,)
STD = (0.35302,)
CROP_AND_FLIP = Augmentation(crop_padding=2, flip=True)
CROP = Augmentation(crop_padding=2)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class FashionMNIST(InMemoryData):
    """Serve the whole of Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747) from memory.

    The four IDX files are read and checked when the module is created. Evaluation uses the official test set.

    Args:
        root: folder of the IDX files (`train-images-idx3-ubyte.gz`, ...; gzipped or not), or a torchvision root with
            `FashionMNIST/raw`. None searches the folder of Debian's package `dataset-fashion-mnist`, then `data/`.
        batch_size: images per batch and process.
        augmentation: augmentation of training images.
        seed: seed of order and augmentation.
        mean: one value, in units of [0, 1]; default is that of the 60,000 training images.
        std: one value, likewise.
        labels: False: distil representations without the labels, which then serve to measure them.

    Raises:
        FileNotFoundError: if a file is missing; says where to get it.
        ValueError: if a file is damaged; names it.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 128,
        augmentation: Augmentation = CROP_AND_FLIP,
        seed: int = 0,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
        labels: bool = True,
    ) -> None:
        folders = [DEBIAN_FOLDER, Path("data")] if root is None else [Path(root)]
        train, _ = train_or_val(
            lambda: read_fashion_mnist(folders, "train"), lambda: read_fashion_mnist(folders, "t10k")
        )
        memory = InMemory(
            train,
            read_fashion_mnist(folders, "t10k"),
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            mean=mean,
            std=std,
            labels=labels,
        )
        super().__init__(memory, CLASSES)
        self.root = root


def read_fashion_mnist(folders: list[Path], split: str) -> ImageSet:
    """Read one split from the first folder that contains it.

    Args:
        folders: folders to search, each together with its `FashionMNIST/raw`.
        split: "train" or "t10k", as in the file names.

    Returns:
        (N, 1, 28, 28) uint8 images and (N,) int64 labels.

    Raises:
        FileNotFoundError: if a file is missing; says where to get it.
        ValueError: if a file is damaged; names it.
    """
    images_path = _find(folders, f"{split}-images-idx3-ubyte")
    labels_path = _find(folders, f"{split}-labels-idx1-ubyte")
    images = read_idx(images_path, ndim=3)
    if images.shape[1:] != (28, 28):
        raise ValueError(
            f"{images_path}: images are {tuple(images.shape[1:])}, not (28, 28); fetch Fashion-MNIST again."
        )
    data = ImageSet(images[:, None], read_idx(labels_path, ndim=1).long())
    check_image_set(data, len(CLASSES), str(labels_path))
    return data


def _find(folders: list[Path], name: str) -> Path:
    places = [place for folder in folders for place in (folder, folder / "FashionMNIST" / "raw")]
    candidates = [place / file for place in places for file in (f"{name}.gz", name)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"Fashion-MNIST's {name}.gz is in none of {', '.join(map(str, places))}. "
            "Get it with `apt install dataset-fashion-mnist`, or with "
            "`torchvision.datasets.FashionMNIST('data', download=True)`, and give its folder as root."
        )
    return found


class FashionSubset(InMemoryData):
    """Serve a fixed, class-balanced subset of Fashion-MNIST that comes with the package.

    It holds the first 800 training and the first 200 test images of each class, in their official order and bit-exact,
    taken from the official training and test sets (`scripts/make_fashion_subset.py` made it). It is normalised with the
    statistics of the full set, so models of one set can be used on the other.

    Args:
        batch_size: images per batch and process.
        augmentation: augmentation of training images.
        seed: seed of order and augmentation.
        mean: one value, in units of [0, 1].
        std: one value, likewise.
    """

    def __init__(
        self,
        batch_size: int = 128,
        augmentation: Augmentation = CROP_AND_FLIP,
        seed: int = 0,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
        labels: bool = True,
        per_class: int | None = None,
    ) -> None:
        train, test = read_fashion_subset()
        if per_class is not None:
            train = _some_of_each(train, per_class, seed)
        memory = InMemory(
            train,
            test,
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            mean=mean,
            std=std,
            labels=labels,
        )
        super().__init__(memory, CLASSES)
        self.per_class = per_class


def _some_of_each(data: ImageSet, count: int, seed: int) -> ImageSet:
    most = int(data.labels.bincount().min())
    if not 1 <= count <= most:
        raise ValueError(f"per_class={count} is no number of images of each class: give 1 to {most}.")
    generator = torch.Generator().manual_seed(mix_seed(seed, count))
    order = torch.randperm(len(data.labels), generator=generator)
    chosen = torch.cat([order[data.labels[order] == label][:count] for label in range(len(CLASSES))])
    return ImageSet(data.images[chosen], data.labels[chosen])


class FashionPairs(InMemoryData):
    """Serve pairs of garments side by side, whose class is the ordered pair of their classes: a hundred classes.

    Composed of the packaged subset, or of the whole of Fashion-MNIST for training: a task with many classes that are
    related, as those that people distil, and with as many training images as are asked for. The pairs are the same for
    every `seed`; training pairs are made of training images, evaluation pairs of test images of the subset.

    Args:
        count: number of training pairs.
        test_count: number of evaluation pairs.
        batch_size: images per batch and process.
        augmentation: augmentation of training images; without flips, which would turn a pair into another's mirror.
        seed: seed of order and augmentation.
        mean: one value, in units of [0, 1].
        std: one value, likewise.
        whole: compose training pairs of all 60,000 training images instead of the subset's 8,000.
        root: with `whole`, folder of the files, as for :class:`FashionMNIST`.

    Raises:
        ValueError: if a count does not give each class a pair.
        FileNotFoundError: with `whole`, if its files are missing; says where to get them.
    """

    def __init__(
        self,
        count: int = 6_000,
        test_count: int = 2_000,
        batch_size: int = 128,
        augmentation: Augmentation = CROP,
        seed: int = 0,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
        *,
        whole: bool = False,
        root: str | Path | None = None,
    ) -> None:
        if min(count, test_count) < len(CLASSES) ** 2:
            raise ValueError(
                f"count {count} and test_count {test_count} must be {len(CLASSES) ** 2} or more, a pair for each class"
            )
        folders = [DEBIAN_FOLDER, Path("data")] if root is None else [Path(root)]
        source = read_fashion_mnist(folders, "train") if whole else read_fashion_part("train")
        names = tuple(f"{left} and {right}" for left in CLASSES for right in CLASSES)
        memory = InMemory(
            compose_pairs(source, count, seed=1),
            compose_pairs(read_fashion_part("test"), test_count, seed=2),
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            mean=mean,
            std=std,
        )
        super().__init__(memory, names)
        self.count, self.test_count, self.whole, self.root = count, test_count, whole, root


def compose_pairs(single: ImageSet, count: int, *, seed: int) -> ImageSet:
    """Return images in pairs side by side, (count, 1, 28, 56), with the labels 10 * left + right, equally frequent."""
    draw = torch.Generator().manual_seed(seed)
    classes = len(CLASSES)
    labels = (torch.arange(count) % classes**2)[torch.randperm(count, generator=draw)]
    members = [torch.nonzero(single.labels == one).flatten() for one in range(classes)]
    halves = []
    for side in (labels // classes, labels % classes):
        drawn = torch.rand(count, generator=draw)
        indices = torch.empty(count, dtype=torch.int64)
        for one, own in enumerate(members):
            here = side == one
            indices[here] = own[(drawn[here] * len(own)).long()]
        halves.append(single.images[indices])
    return ImageSet(torch.cat(halves, dim=3), labels)


def read_fashion_subset() -> tuple[ImageSet, ImageSet]:
    """Read the training and the test part: (N, 1, 28, 28) uint8 images and (N,) int64 labels each."""
    return read_fashion_part("train"), read_fashion_part("test")


def read_fashion_part(part: Literal["train", "test"]) -> ImageSet:
    """Read one part: (N, 1, 28, 28) uint8 images and (N,) int64 labels."""
    content = files("diffkd").joinpath("assets", "fashion_mnist", "subset.npz").read_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return ImageSet(
            torch.from_numpy(arrays[f"{part}_images"])[:, None], torch.from_numpy(arrays[f"{part}_labels"]).long()
        )
