import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.data import Arrays, FashionSubset, ImageFolder, UnlabelledFolder, hold_out
from diffkd.data.loaders import BANK, HELD_OUT, QUERIES
from diffkd.tasks.data_facts import facts_of


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((12, 10, 3), value % 256, dtype=np.uint8)
    pixels[: 1 + value % 11] = 255 - value % 256
    Image.fromarray(pixels).save(path)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "pictures"
    for index in range(12):
        write_image(root / ("a", "b/c", ".")[index % 3] / f"{index:02d}.png", 20 * index)
    for hidden in (".cache/x.png", "a/._00.png"):
        write_image(root / hidden)
    return root


@pytest.fixture
def probe(tmp_path):
    for split, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                write_image(tmp_path / "probe" / split / name / f"{index}.png", 100 * label + index)
    return tmp_path / "probe"


def folder(root, **options):
    return UnlabelledFolder(root, **({"image_size": 8, "batch_size": 4, "num_workers": 0, "val_share": 0.25} | options))


def training_files(data):
    return data.train_dataloader()._loader.dataset.samples.paths


def test_images_at_any_depth_are_found_and_some_are_held_out(tree):
    data = folder(tree)
    train, held = training_files(data), data.val_dataloader().parts[0][1]._loader.dataset.samples.paths
    assert len(train) == 9
    assert sorted([*train, *held]) == sorted(str(path) for path in tree.rglob("[0-9]*.png"))
    facts = facts_of(data)
    assert (facts.task, facts.num_classes, facts.classes, facts.example.shape) == (
        "representation",
        0,
        (),
        (2, 3, 8, 8),
    )


def test_training_batches_depend_on_seed_epoch_and_index_alone(tree):
    def batches(data, epoch, start=0):
        data.start_batch = start
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        return list(loader)

    first, again = batches(folder(tree), 1), batches(folder(tree), 1)
    assert all(
        torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True)
    )
    resumed = batches(folder(tree), 1, start=1)
    assert torch.equal(resumed[0][0], first[1][0])
    assert not torch.equal(batches(folder(tree), 2)[0][0], first[0][0])
    assert first[0][1].tolist() == [-1] * 4


def test_the_probe_comes_with_the_evaluation_batches(tree, probe):
    seen = {HELD_OUT: [], BANK: [], QUERIES: []}
    for _, labels, indices, kind in folder(tree, probe=probe).val_dataloader():
        seen[kind] += list(zip(labels.tolist(), indices.tolist(), strict=True))
    assert [label for label, _ in seen[HELD_OUT]] == [-1] * 3
    assert [label for label, _ in seen[BANK]] == [0] * 5 + [1] * 5
    assert [label for label, _ in seen[QUERIES]] == [0, 0, 1, 1]
    assert [index for _, index in seen[BANK]] == list(range(10))


def test_a_probe_without_evaluation_images_lends_a_fifth(tree, probe):
    (probe / "val").rename(probe / "other")
    data = folder(tree, probe=probe)
    kinds = [kind for _, labels, _, kind in data.val_dataloader() for _ in labels]
    assert (kinds.count(BANK), kinds.count(QUERIES)) == (8, 2)


def test_a_list_of_files_and_a_folder_to_hold_out(tree, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\ufeffa/00.png\n\nb/c/01.png\na/03.png\n", encoding="utf-8")
    write_image(tmp_path / "held" / "x.png")
    write_image(tmp_path / "held" / "y.png")
    data = folder(tree, files=names, val=str(tmp_path / "held"))
    assert [path.rpartition("/")[2] for path in training_files(data)] == ["00.png", "01.png", "03.png"]
    inside = folder(tree, val="a")
    assert not any("/a/" in path for path in training_files(inside))


def test_bad_folders_are_named_with_the_mend(tree, probe, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images, no files; add images \(\.avif"):
        folder(tmp_path / "empty")
    write_image(tmp_path / "empty" / "one.png")
    with pytest.raises(ValueError, match=r"1 image\(s\), of which two .* add images"):
        folder(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such folder; give a folder of images"):
        folder(tmp_path / "nowhere")
    names = tmp_path / "names.txt"
    names.write_text("gone.png\n../x.png\n")
    with pytest.raises(ValueError, match=r"'\.\./x\.png' is no file inside"):
        folder(tree, files=names)
    names.write_bytes("é.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names\.txt: no text in UTF-8 .*; save it as UTF-8"):
        folder(tree, files=names)
    names.write_text("gone.png\n")
    with pytest.raises(FileNotFoundError, match=r"1 of its files are not in .*gone\.png"):
        folder(tree, files=names)
    for split in ("train", "val"):
        (probe / split / "dog").rename(tmp_path / f"dog-{split}")
    with pytest.raises(ValueError, match=r"the probe has one class \(cat\).*two classes or more"):
        folder(tree, probe=probe)


def test_broken_images_stop_or_are_left_out(tree):
    (tree / "a" / "03.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 12 images are broken"):
        folder(tree, verify=True)
    with pytest.warns(UserWarning, match="1 of 12 images are left out"):
        data = folder(tree, on_bad_image="skip")
    assert len(data.skipped) == 1
    assert str(tree / "a" / "03.png") not in training_files(data)


def test_links_out_of_the_folder_are_refused(tree, tmp_path):
    write_image(tmp_path / "outside.png")
    (tree / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(ValueError, match="outside of"):
        folder(tree)
    assert any(path.endswith("link.png") for path in training_files(folder(tree, follow_links=True, val_share=0.01)))


def test_labels_may_be_left_out_of_labelled_data(probe, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(20) % 4)
    of_arrays = Arrays(tmp_path / "train.npz", tmp_path / "test.npz", batch_size=8, labels=False)
    of_folders = ImageFolder(probe, image_size=8, batch_size=8, num_workers=0, labels=False)
    for data, counts in (
        (of_arrays, (20, 20)),
        (of_folders, (4, 10)),
        (FashionSubset(2000, labels=False), (2000, 8000)),
    ):
        assert (facts_of(data).task, data.num_classes) == ("representation", 0)
        kinds = [kind for _, labels, _, kind in data.val_dataloader() for _ in labels]
        assert (kinds.count(HELD_OUT), kinds.count(BANK)) == counts
    assert facts_of(FashionSubset()).task == "classification"
    # Of one class the probe would call every student perfect: such images are distilled without it.
    np.savez(tmp_path / "one.npz", images=images, labels=np.zeros(20, dtype=int))
    with pytest.warns(UserWarning, match=r"all images are of one class \(0\).* no probe; give images of two classes"):
        one = Arrays(tmp_path / "one.npz", tmp_path / "one.npz", batch_size=8, labels=False)
    assert (facts_of(one).probe, facts_of(of_arrays).probe) == (False, True)


def test_a_part_can_be_held_back_for_a_search_of_values(tree, probe):
    data = hold_out(folder(tree, probe=probe), 0.5, seed=0)
    assert len(list(data.val_dataloader())) == len(data.val_dataloader())
    held = [kind for _, labels, _, kind in data.val_dataloader() for _ in labels].count(HELD_OUT)
    assert held == 4


def pack(archive, members, mode="w"):
    """Write an archive of {name: bytes, or the target of a link}, with a caption beside each file."""
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, mode) as opened:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                opened.addfile(member)
                continue
            for each, text in ((member, content), (tarfile.TarInfo(f"{name}.json"), b"{}")):
                each.size = len(text)
                opened.addfile(each, io.BytesIO(text))


def read(path):
    return path.read_bytes()


def test_images_in_shards_are_those_of_files(tree, tmp_path):
    paths = sorted(tree.rglob("[0-9]*.png"))
    for path in paths:  # so that both are in the same order
        path.rename(tree / path.name)
    paths = sorted(tree.glob("*.png"))
    first = {f"./{path.name}": read(path) for path in paths[:7]} | {"._00.png": b"", "link.png": "/etc/hosts"}
    pack(tmp_path / "shards" / "000.tar", first)
    pack(tmp_path / "shards" / "001.tar", {f"/{path.name}": read(path) for path in paths[7:]})
    plain, packed = folder(tree), folder(tmp_path / "shards", verify=True)
    assert [path.rpartition("/")[2] for path in training_files(packed)] == [
        path.rpartition("/")[2] for path in training_files(plain)
    ]
    for epoch in (0, 1):
        for loader in (one := [data.train_dataloader() for data in (plain, packed)]):
            loader.set_epoch(epoch)
        for ours, theirs in zip(*one, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    member = training_files(packed)[0]
    again = pickle.loads(pickle.dumps(member))  # as worker processes receive it
    assert (again, again.read()) == (member, member.read())

    # One archive alone, one named in a list, and one to hold out.
    assert len(training_files(folder(tmp_path / "shards" / "000.tar", val_share=0.3))) == 5
    names = tmp_path / "names.txt"
    names.write_text("001.tar\n")
    assert len(training_files(folder(tmp_path / "shards", files=names, val_share=0.4))) == 3
    # Beside images archives may hold the same ones again.
    (tmp_path / "shards" / "000.tar").rename(tree / "000.tar")
    with pytest.warns(UserWarning, match=r"1 file\(s\) are passed over.*'\.tar'"):
        assert len(training_files(folder(tree))) == 9


@pytest.mark.parametrize(
    ("start", "content"),
    [
        (512 * 4, b"\xff" * 512),  # the header of the second image
        (512 * 4 + 124, b"\xff" * 11 + b"\x80"),  # its size, which would lead back: some versions of tarfile never end
    ],
)
def test_damaged_archives_are_not_read_in_part(tmp_path, start, content):
    archive = tmp_path / "shards" / "000.tar"
    pack(archive, {f"{name}.png": b"x" for name in "abcde"})
    whole = bytearray(archive.read_bytes())
    whole[start : start + len(content)] = content
    archive.write_bytes(whole)
    with pytest.raises(
        ValueError, match=r"000\.tar: no whole, uncompressed tar archive .* download a damaged one again"
    ):
        folder(tmp_path / "shards")


@pytest.mark.parametrize(
    ("members", "mode", "kept", "message"),
    [
        ({"a.png": b"x"}, "w:gz", None, r"no whole, uncompressed tar archive .*gunzip or unzstd"),
        ({"../a.png": b"x"}, "w", None, r"'\.\./a\.png' leads out of the archive"),
        ({"a.png": b"x" * 3000}, "w", 2000, r"it is cut off in 'a\.png'; copy or download it again"),
        ({"a.txt": b"x"}, "w", None, r"no images in 1 tar archive\(s\), only '\.json', '\.txt'; give archives"),
        ({}, "w", 0, r"no whole, uncompressed tar archive \(empty file\)"),
        ({"a.png": b"", "b.png": b"x", "c.png": b"x", "d.png": b"x"}, "w", None, r"000\.tar/a\.png is empty"),
    ],
)
def test_archives_that_cannot_be_read_are_named_with_the_mend(tmp_path, members, mode, kept, message):
    archive = tmp_path / "shards" / "000.tar"
    pack(archive, members, mode)
    archive.write_bytes(archive.read_bytes()[:kept])
    with pytest.raises(ValueError, match=message):
        folder(tmp_path / "shards")
