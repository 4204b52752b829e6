"""Fashion-MNIST, all of it: 60,000 training and 10,000 test images, 28x28 grey, ten kinds of clothing."""

from pathlib import Path

from diffkd.data.augmentation import Augmentation
from diffkd.data.idx import read_idx
from diffkd.data.image_data import ImageData
from diffkd.data.image_set import ImageSet, check_image_set
from diffkd.data.in_memory import InMemory

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
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class FashionMNIST(ImageData):
    """Serve the whole of Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747) from memory.

    The four IDX files are read when the module is made, so that a bad one is found before training. Evaluation is on
    the official test set.

    Args:
        root: folder of the IDX files (`train-images-idx3-ubyte.gz`, ...; gzipped or not), or a folder of torchvision
            with them in `FashionMNIST/raw`. None looks where Debian's package `dataset-fashion-mnist` puts them, then
            in `data/`.
        batch_size: images per batch and process.
        augmentation: what is done to training images.
        seed: seed of order and augmentation.
        mean: one value, in units of [0, 1]; default is that of the 60,000 training images.
        std: one value, likewise.

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
    ) -> None:
        folders = [DEBIAN_FOLDER, Path("data")] if root is None else [Path(root)]
        memory = InMemory(
            read_fashion_mnist(folders, "train"),
            read_fashion_mnist(folders, "t10k"),
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            mean=mean,
            std=std,
        )
        super().__init__(memory, CLASSES, image_size=(28, 28), mean=memory.mean, std=memory.std)
        self.augmentation = augmentation
        self.batch_size, self.seed = batch_size, seed
        self.root = root


def read_fashion_mnist(folders: list[Path], split: str) -> ImageSet:
    """Read one split from the first folder that has it.

    Args:
        folders: where to look; in each also its `FashionMNIST/raw`.
        split: "train" or "t10k", as the files are named.

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
