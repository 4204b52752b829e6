import zipfile

import numpy as np
import pytest
import torch

from diffkd.data import Arrays
from diffkd.data.classification.arrays import read_npz
from diffkd.tasks.data_facts import facts_of

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(12) % 4


def save(folder, name="train.npz", **arrays):
    path = folder / name
    np.savez(path, **arrays)
    return path


def pair(folder, **change):
    """Write a good test file, and a training file with changes; None removes a key."""
    arrays = {"images": IMAGES, "labels": LABELS} | change
    train = save(folder, **{key: value for key, value in arrays.items() if value is not None})
    return train, save(folder, "test.npz", images=IMAGES, labels=LABELS)


def test_the_layouts_mean_the_same(tmp_path):
    last, _ = read_npz(save(tmp_path, images=IMAGES, labels=LABELS))
    first, _ = read_npz(save(tmp_path, images=IMAGES.transpose(0, 3, 1, 2), labels=LABELS))
    grey, _ = read_npz(save(tmp_path, images=IMAGES[..., 0], labels=LABELS))
    assert last.images.shape == (12, 3, 6, 5)
    assert torch.equal(last.images, first.images)
    assert torch.equal(grey.images, last.images[:, :1])
    assert last.labels.dtype == torch.int64


def test_many_channels_need_the_layout_named(tmp_path):
    path = save(tmp_path, images=np.zeros((2, 6, 5, 8), np.uint8), labels=LABELS[:2])
    with pytest.raises(ValueError, match="layout NHWC or NCHW"):
        read_npz(path)
    assert read_npz(path, "NHWC").data.images.shape == (2, 8, 6, 5)


def test_the_module_serves_both_files(tmp_path):
    data = Arrays(*pair(tmp_path, classes=np.array(["a", "b", "c", "d"])), batch_size=5)
    assert data.classes == ("a", "b", "c", "d")
    assert (data.num_classes, data.in_channels, data.image_size) == (4, 3, (6, 5))
    images, labels, indices = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert indices.tolist() == list(range(12))
    assert torch.equal(labels, torch.from_numpy(LABELS))
    torch.testing.assert_close(
        images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0
    )  # train and test are equal
    torch.testing.assert_close(images.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert len(data.train_dataloader()) == 3
    assert data.example().shape == (2, 3, 6, 5)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("named", [False, True])
def test_one_column_of_labels_is_one_label_each(tmp_path, count, named):
    labels = LABELS % count
    names = {"classes": np.array(list("abcd")[:count])} if named else {}
    train = save(tmp_path, images=IMAGES, labels=labels[:, None].astype(np.uint8), **names)
    data = Arrays(train, save(tmp_path, "test.npz", images=IMAGES, labels=labels), batch_size=12)
    assert (data.num_classes, data.multi_label) == (count, False)
    for _, found, _ in data.val_dataloader():
        assert found.tolist() == labels.tolist()
    assert Arrays(train, train).classes == data.classes
    with pytest.raises(ValueError, match="label 9 at index 3 is out of range"):
        Arrays(train, save(tmp_path, "other.npz", images=IMAGES, labels=changed(labels, 3, 9)[:, None]))


def test_one_column_of_a_single_named_class_says_which_images_have_it(tmp_path):
    column = (LABELS % 2)[:, None]
    train = save(tmp_path, images=IMAGES, labels=column, classes=np.array(["scratch"]))
    for test in (train, save(tmp_path, "test.npz", images=IMAGES, labels=column)):
        data = Arrays(train, test, batch_size=12)
        assert (data.classes, data.multi_label) == (("scratch",), True)
        for _, found, _ in data.val_dataloader():
            assert found.tolist() == column.tolist()


def test_classes_are_counted_when_they_have_no_names(tmp_path):
    data = Arrays(*pair(tmp_path))
    assert data.classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("names", [None, np.array(list("abcdefgh"))])
def test_classes_without_a_training_image_are_named(tmp_path, names):
    train = save(tmp_path, images=IMAGES, labels=LABELS * 2 + 1, **({} if names is None else {"classes": names}))
    unseen = r"'0', '2', '4', '6'" if names is None else r"'a', 'c', 'e', 'g'"
    with pytest.warns(UserWarning, match=rf"train.npz: no image of class\(es\) {unseen}, .* without gaps"):
        assert Arrays(train, train).num_classes == 8


def test_names_may_be_bytes_or_in_the_test_file_alone(tmp_path):
    names = np.array(list("abcd"))
    assert Arrays(*pair(tmp_path, classes=names.astype(bytes))).classes == ("a", "b", "c", "d")
    train, _ = pair(tmp_path)
    assert Arrays(train, save(tmp_path, "named.npz", images=IMAGES, labels=LABELS, classes=names)).classes[0] == "a"


def test_given_statistics_are_used(tmp_path):
    data = Arrays(*pair(tmp_path), mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert data.mean == (0.1, 0.2, 0.3)
    first = torch.from_numpy(IMAGES[0]).permute(2, 0, 1) / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    torch.testing.assert_close(data.example()[0], first)


def test_finite_floats_are_kept(tmp_path):
    floats = RANDOM.normal(size=(12, 6, 5, 3))
    train = save(tmp_path, images=floats, labels=LABELS)
    data = Arrays(train, train, mean=(0.0,) * 3, std=(1.0,) * 3)
    torch.testing.assert_close(data.example()[0], torch.from_numpy(floats[0]).permute(2, 0, 1).float())


@pytest.mark.parametrize(
    ("images", "unit"),
    [
        (IMAGES, 1),
        (IMAGES / 255, 1),
        (IMAGES / 250 - 0.02, 1),  # overshoots, as of a resize
        (IMAGES.astype(np.float32), 255),
        (IMAGES / 255 * 20, 255),
        (IMAGES / 255 * 15, None),
        (IMAGES / 128 - 1, None),
        (IMAGES * 16.0, None),
    ],
)
def test_floats_are_pixels_of_the_range_that_they_are_in(tmp_path, images, unit):
    data = Arrays(*[save(tmp_path, images=images, labels=LABELS)] * 2)
    assert data.pixel_unit == unit
    pixels, given = facts_of(Arrays(*pair(tmp_path))), facts_of(data)
    assert given.pixel_unit == unit
    assert given.mean == pytest.approx(data.mean if unit is None else [value / unit for value in data.mean])
    if images.max() == 255:  # the same images
        assert (given.mean, given.std) == (pytest.approx(pixels.mean), pytest.approx(pixels.std))


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"no key 'labels', only \['images'\]"),
        ({"labels": LABELS[:5]}, "12 images but 5 labels"),
        ({"labels": LABELS.astype(float)}, "labels are float64"),
        ({"labels": np.zeros((12, 1, 1), dtype=int)}, r"labels are int64 \(12, 1, 1\)"),
        ({"labels": changed(LABELS, 7, -1)}, "label -1 at index 7 is out of range for 4 classes"),
        ({"labels": changed(LABELS, 3, 9), "classes": np.array(list("abcd"))}, "label 9 at index 3 is out of range"),
        ({"images": changed(IMAGES.astype(np.float32), 5, np.nan)}, r"image 5 holds NaN or infinity \(1 such"),
        ({"images": changed(IMAGES.astype(np.float32), (8, 0, 0, 0), np.inf)}, "image 8 holds NaN or infinity"),
        ({"images": IMAGES.astype(np.uint16)}, "images are uint16"),
        ({"images": IMAGES[0, 0]}, r"images have shape \(5, 3\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "no images"),
        ({"images": np.array([object()] * 12)}, "not plain arrays"),
        ({"labels": LABELS + 10**9}, "label 1000000003 makes 1000000004 classes; number"),
        ({"classes": np.array("abcd")}, r"classes are <U4 \(\); give texts of shape"),
        ({"classes": np.array([list("abcd")])}, r"classes are <U1 \(1, 4\)"),
        ({"images": IMAGES[:, :4]}, r"test.npz: images are .*\(3, 6, 5\).*train.npz are .*\(3, 4, 5\)"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        Arrays(*pair(tmp_path, **change))
    assert ".npz" in str(error.value)


def test_test_labels_must_be_among_the_training_classes(tmp_path):
    _, train = pair(tmp_path)
    with pytest.raises(ValueError, match=r"test2.npz: label 4 at index 0 is out of range for 4 classes"):
        Arrays(train, save(tmp_path, "test2.npz", images=IMAGES, labels=LABELS[::-1] + 1))


def test_class_names_must_agree(tmp_path):
    train = save(tmp_path, images=IMAGES, labels=LABELS, classes=np.array(list("abcd")))
    with pytest.raises(ValueError, match="its classes"):
        Arrays(train, save(tmp_path, "test.npz", images=IMAGES, labels=LABELS, classes=np.array(list("abdc"))))


@pytest.mark.parametrize("keep", [0, 10, 300, -30])
def test_truncated_files_are_named(tmp_path, keep):
    train, test = pair(tmp_path)
    train.write_bytes(train.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train.npz: damaged"):
        Arrays(train, test)


def test_flipped_bytes_are_noticed(tmp_path):
    train, test = pair(tmp_path)
    content = bytearray(train.read_bytes())
    content[500] ^= 0xFF
    train.write_bytes(content)
    with pytest.raises(ValueError, match=r"train.npz: damaged"):
        Arrays(train, test)


def test_a_member_that_is_no_array_is_refused(tmp_path):
    path = tmp_path / "train.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", b"pixels")
        archive.writestr("labels", b"0")
    with pytest.raises(ValueError, match=r"train.npz: damaged, or not plain arrays \(images is no array"):
        read_npz(path)


def test_a_pickle_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    train, test = pair(tmp_path, images=np.array([Hostile()] * 12))
    with pytest.raises(ValueError, match="not plain arrays"):
        Arrays(train, test)
    assert not (tmp_path / "ran").exists()


def test_a_single_array_and_a_missing_file(tmp_path):
    np.save(tmp_path / "one.npy", IMAGES)
    with pytest.raises(ValueError, match=r"only.*a single array"):
        read_npz(tmp_path / "one.npy")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_npz(tmp_path / "none.npz")


def test_a_decompression_bomb_is_refused_by_its_table_of_contents(tmp_path):
    """Nothing of it is unpacked."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", b"")
        archive.writestr("images.npy", bytes(2**28 + 1))
    with pytest.raises(ValueError, match=r"bomb\.npz unpacks to 256 MiB, more than 200 times its size"):
        read_npz(path)
