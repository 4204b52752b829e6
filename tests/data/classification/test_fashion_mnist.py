import gzip
import struct

import pytest
import torch

from diffkd.data import FashionMNIST
from diffkd.data.classification import fashion_mnist
from diffkd.data.classification.fashion_mnist import read_idx


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.numpy().tobytes()


def write_split(folder, split, count, *, zipped=True):
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count, dtype=torch.uint8) % 10
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        content = idx(array)
        if zipped:
            (folder / f"{split}-{kind}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{split}-{kind}").write_bytes(content)
    return images, labels


@pytest.fixture
def root(tmp_path):
    write_split(tmp_path, "train", 20)
    write_split(tmp_path, "t10k", 10)
    return tmp_path


@pytest.mark.parametrize(("inside", "zipped"), [("", True), ("FashionMNIST/raw", True), ("FashionMNIST/raw", False)])
def test_both_layouts_are_read(tmp_path, inside, zipped):
    write_split(tmp_path / inside, "train", 20, zipped=zipped)
    images, labels = write_split(tmp_path / inside, "t10k", 10, zipped=zipped)
    data = FashionMNIST(tmp_path, batch_size=10, mean=(0.0,), std=(1.0,))
    ((batch, batch_labels, indices),) = data.val_dataloader()
    assert torch.equal((batch[:, 0] * 255).round().to(torch.uint8), images)
    assert torch.equal(batch_labels, labels.long())
    assert indices.tolist() == list(range(10))


def test_the_module_says_what_it_is(root):
    data = FashionMNIST(root, batch_size=5)
    assert (data.num_classes, len(data.classes), data.in_channels, data.image_size) == (10, 10, 1, (28, 28))
    assert data.example().shape == (2, 1, 28, 28)
    assert len(data.train_dataloader()) == 4
    assert len(data.test_dataloader()) == 2


def test_the_first_epoch_starts_at_start_batch(root):
    data = FashionMNIST(root, batch_size=5)
    whole = [batch[2].tolist() for batch in data.train_dataloader()]
    data.start_batch = 3
    loader = data.train_dataloader()
    assert [batch[2].tolist() for batch in loader] == whole[3:]
    loader.set_epoch(1)
    assert len(list(loader)) == 4


def test_without_files_both_ways_to_get_them_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"apt install dataset-fashion-mnist.*torchvision"):
        FashionMNIST(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere, .*data"):
        FashionMNIST()


def test_a_truncated_archive_is_named(root):
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz: truncated or damaged"):
        FashionMNIST(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x08\x03\0\0", "truncated"),
        (b"\0\0\x0d\x01\0\0\0\x01\0", "not an IDX file"),
        (b"\0\0\x08\x01\0\0\0\x01\0", "not an IDX file of bytes in 3"),
        (idx(torch.zeros(2, 28, 28, dtype=torch.uint8))[:-1], "states 1568 bytes"),
        (idx(torch.zeros(2, 28, 28, dtype=torch.uint8)) + b"\0", "states 1568 bytes"),
        (b"\0\0\x08\x03" + b"\0\1\0\0" * 3, "unpacks to"),
    ],
)
def test_broken_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path, ndim=3)
    assert str(path) in str(error.value)


def test_no_gzip_file_at_all(tmp_path):
    path = tmp_path / "page.gz"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"page.gz: truncated or damaged"):
        read_idx(path, ndim=1)


def test_labels_and_sizes_are_checked(root):
    (root / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.full((10,), 11, dtype=torch.uint8))))
    with pytest.raises(ValueError, match="label 11 at index 0 is out of range for 10 classes"):
        FashionMNIST(root)
    (root / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.zeros(9, dtype=torch.uint8))))
    with pytest.raises(ValueError, match="10 images but 9 labels"):
        FashionMNIST(root)
    (root / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(torch.zeros(9, 8, 8, dtype=torch.uint8))))
    with pytest.raises(ValueError, match=r"images are \(8, 8\), not \(28, 28\)"):
        FashionMNIST(root)


def test_a_size_that_no_file_of_this_size_can_have_is_refused(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">III", 2**32 - 1, 28, 28)))
    with pytest.raises(ValueError, match=r"bomb\.gz unpacks to [\d,]+ MiB"):
        read_idx(path, 3)
