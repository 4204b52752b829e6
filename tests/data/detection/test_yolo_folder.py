from pathlib import Path

import pytest
from PIL import Image

from diffkd.data.detection.yolo import read_yolo, read_yolo_facts


@pytest.fixture
def root(tmp_path):
    for folder in ("images/train/sub", "labels/train/sub"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a.jpg", "b.png", "sub/c.jpg"):
        Image.new("RGB", (40, 20)).save(tmp_path / "images/train" / name)
    (tmp_path / "labels/train/a.txt").write_text("1 0.5 0.5 0.25 0.5\n\n0 0.9 0.5 0.4 0.2\n0 0.5 0.5 0 0.5\n")
    (tmp_path / "labels/train/sub/c.txt").write_text("0 0.1 0.2 0.6 0.1 0.5 0.9\n")
    return tmp_path


def read(root, *places, **options):
    return read_yolo(root, places or ["images/train"], ["cat", "dog"], **options)


def test_what_is_in_the_folders(root):
    files = read(root)
    assert (files.classes, files.category_ids) == (("cat", "dog"), (0, 1))
    assert files.paths == tuple(str(root / "images/train" / name) for name in ("a.jpg", "b.png", "sub/c.jpg"))
    assert files.sizes.tolist() == [[20, 40]] * 3
    first = files.annotations.of(0)
    assert first.boxes.tolist() == [[15, 5, 25, 15], [pytest.approx(28), 8, 40, 12]]  # the second is cut
    assert first.labels.tolist() == [2, 1]
    assert len(files.annotations.of(1).labels) == 0
    assert files.annotations.of(2).boxes[0].tolist() == pytest.approx([4, 2, 24, 18])  # around the polygon
    assert len(files.dropped) == 1
    assert "box of line 4 of" in files.dropped[0]


def test_a_list_of_images_and_labels_beside_them(root):
    Image.new("RGB", (10, 10)).save(root / "d.jpg")
    (root / "d.txt").write_text("0 0.5 0.5 1 1")
    (root / "some.txt").write_text("./images/train/a.jpg\nd.jpg\n")
    files = read(root, "some.txt")
    assert files.paths == (str(root / "images/train/a.jpg"), str(root / "d.jpg"))
    assert files.annotations.of(1).boxes.tolist() == [[0, 0, 10, 10]]


def test_a_list_may_be_written_on_windows(root):
    (root / "some.txt").write_text("images\\train\\a.jpg\n")
    files = read(root, "some.txt")
    assert files.paths == (str(root / "images/train/a.jpg"),)
    assert len(files.annotations.boxes.labels) > 0


@pytest.mark.parametrize(
    "place", ["{root}/images/train", "../images/train", "images\\train", "..\\images\\train", "absolute.txt"]
)
def test_places_in_the_root_may_be_written_otherwise(root, place, monkeypatch):
    (root / "absolute.txt").write_text(
        "".join(f"{root}/images/train/{name}\n" for name in ("a.jpg", "b.png", "sub/c.jpg"))
    )
    monkeypatch.chdir(root.parent)
    files = read(Path(root.name), place.format(root=root))
    assert len(files.paths) == 3
    assert files.annotations.of(0).labels.tolist() == [2, 1]


def test_labels_that_lie_elsewhere_are_noticed(root):
    (root / "labels").rename(root / "annotations")
    with pytest.warns(UserWarning, match=r"no image has a file of labels; .* would be .*labels/train/a.txt"):
        assert len(read(root).annotations.boxes.labels) == 0


def test_turned_images_have_boxes_of_the_upright_picture(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(root / "images/train/a.jpg", exif=exif)
    files = read(root)
    assert files.sizes[0].tolist() == [40, 20]
    assert files.read(0).shape == (3, 40, 20)
    assert files.annotations.of(0).boxes[0].tolist() == [7.5, 10, 12.5, 30]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 0.5 0.5 0.5", "line 1 has 4 numbers"),
        ("1 0.5 0.5 0.5 0.5 0.9", "line 1 has 6 numbers"),
        ("1 0.5 0.5 0.5 0.5 0.9 0.1 0.2", "line 1 has 8 numbers"),
        ("dog 0.5 0.5 0.5 0.5", "line 1 is 'dog 0.5"),
        ("2 0.5 0.5 0.5 0.5", "line 1 is of class 2; there are 0 to 1"),
        ("-1 0.5 0.5 0.5 0.5", "line 1 is of class -1"),
    ],
)
def test_bad_lines_are_refused_by_name(root, line, message):
    (root / "labels/train/b.txt").write_text(line)
    with pytest.raises(ValueError, match=rf"b.txt: {message}"):
        read(root)


def test_what_leads_out_or_is_missing_is_refused(root, tmp_path_factory):
    secret = tmp_path_factory.mktemp("outside") / "secret.txt"
    secret.write_text("0 0.5 0.5 1 1")
    with pytest.raises(FileNotFoundError, match="images/val"):
        read(root, "images/val")
    with pytest.raises(ValueError, match=r"'\.\./x' is no file inside"):
        read(root, "../x")
    (root / "list.txt").write_text(f"{secret}\n")
    with pytest.raises(ValueError, match="is no file inside"):
        read(root, "list.txt")
    (root / "labels/train/b.txt").symlink_to(secret)
    with pytest.raises(ValueError, match=r"labels/train/b.txt.*outside"):
        read(root)


def test_images_without_a_readable_head(root):
    (root / "images/train/b.png").write_text("nothing")
    with pytest.raises(ValueError, match=r"b.png cannot be read"):
        read(root)
    assert read(root, skip_bad=True).sizes[1].tolist() == [0, 0]


def test_no_images_are_refused(root):
    (root / "images/empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        read(root, "images/empty")


def test_facts_of_a_data_yaml(tmp_path):
    file = tmp_path / "data.yaml"
    file.write_text("path: ../elsewhere\ntrain: images/train\nval: [a, b]\ntest:\nnames: {1: dog, 0: cat}\nnc: 2\n")
    facts = read_yolo_facts(file)
    assert facts.classes == ("cat", "dog")
    assert facts.splits == {"train": ["images/train"], "val": ["a", "b"]}
    file.write_text("names: [cat, 1]\n")
    assert read_yolo_facts(file) == (("cat", "1"), {})
    file.write_text("{}")
    assert read_yolo_facts(file) == (None, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [", "no YAML"),
        ("!!python/object/apply:os.system [ls]", "no YAML"),
        ("- a", "holds a list"),
        ("names: cat", "names is 'cat'"),
        ("names: []", r"names is \[\]"),
        ("names: {0: cat, 2: dog}", "without gaps"),
        ("names: [yes, no]", r"names is \[True, False\]; .* in quotes"),
        ("names: [null]", r"names is \[None\]"),
        ("names: [cat]\nnc: 2", "nc is 2, but there are 1 names"),
        ("train: 5", "train is 5"),
    ],
)
def test_bad_facts_are_refused(tmp_path, content, message):
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"data.yaml: .*{message}"):
        read_yolo_facts(tmp_path / "data.yaml")
