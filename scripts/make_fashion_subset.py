"""Write the subset of Fashion-MNIST that comes with the package; running it again writes the same bytes.

The rule: the first 800 training and the first 200 test images of each class, in the official order. The arrays are
stored in one `.npz` whose members are packed with LZMA, a sixth smaller than np.savez_compressed and readable by plain
np.load.

    python scripts/make_fashion_subset.py [FOLDER WITH THE FOUR IDX FILES]
"""

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffkd.data.classification.fashion_mnist import CLASSES, DEBIAN_FOLDER, read_fashion_mnist

PER_CLASS = {"train": 800, "test": 200}
SPLITS = {"train": "train", "test": "t10k"}
TARGET = Path(__file__).parents[1] / "src" / "diffkd" / "assets" / "fashion_mnist"


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Return the sorted indices of the first `count` samples of each class in labels (N,)."""
    return torch.cat([(labels == label).nonzero()[:count, 0] for label in range(len(CLASSES))]).sort().values


def main(source: Path) -> None:
    """Read the official files in `source` and write `subset.npz` and `card.json`."""
    arrays = {}
    for part, count in PER_CLASS.items():
        images, labels = read_fashion_mnist([source], SPLITS[part])
        chosen = first_of_each_class(labels, count)
        arrays[f"{part}_images"] = images[chosen, 0].numpy()
        arrays[f"{part}_labels"] = labels[chosen].to(torch.uint8).numpy()

    TARGET.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(TARGET / "subset.npz", "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # without a time stamp
            member.compress_type = zipfile.ZIP_LZMA
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            archive.writestr(member, content.getvalue())

    card = {
        "name": "Fashion-MNIST, class-balanced subset",
        "source": "https://github.com/zalandoresearch/fashion-mnist",
        "licence": "MIT, see LICENSE",
        "rule": "the first images of each class, in the official order, of the official training and test sets",
        "classes": CLASSES,
        "images_per_class": PER_CLASS,
        "arrays": {
            name: {
                "shape": array.shape,
                "dtype": str(array.dtype),
                "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            }
            for name, array in arrays.items()
        },
    }
    (TARGET / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEBIAN_FOLDER)
