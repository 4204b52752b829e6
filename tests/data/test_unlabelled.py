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
    names.write_text("00.png\n\nb/c/01.png\na/03.png\n".replace("00.png", "a/00.png"))
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


def test_a_part_can_be_held_back_for_a_search_of_values(tree, probe):
    data = hold_out(folder(tree, probe=probe), 0.5, seed=0)
    assert len(list(data.val_dataloader())) == len(data.val_dataloader())
    held = [kind for _, labels, _, kind in data.val_dataloader() for _ in labels].count(HELD_OUT)
    assert held == 4
