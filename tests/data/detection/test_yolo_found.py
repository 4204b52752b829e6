"""YOLO folders as tools write them: key points, labels elsewhere, other spellings, and malformed lines."""

import warnings

import pytest
from PIL import Image

from diffkd.data import YoloDetection
from diffkd.data.detection.yolo import read_yolo, read_yolo_layout

BOX = [16, 6, 24, 14]
LINE = "0 0.5 0.5 0.2 0.4"
POLYGON = "0 0.1 0.2 0.6 0.1 0.5 0.9"


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            write(tmp_path, f"images/{split}/{name}.png", f"labels/{split}/{name}.txt")
    (tmp_path / "data.yaml").write_text("names: [cat]\n")
    return tmp_path


def write(root, image, label, line=LINE):
    for path in (root / image, root / label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(root / image)
    (root / label).write_text(line + "\n")


def module(root, **options):
    return YoloDetection(root, num_workers=0, batch_size=2, **options)


def train_boxes(root, **options):
    return [target["boxes"].tolist() for target in next(iter(module(root, **options).val_dataloader()))[1]]


def read(root, **options):
    return read_yolo(root, ["images/train"], ["cat", "dog"], **options)


def boxes(files, index=0):
    return [[round(side, 3) for side in box] for box in files.annotations.of(index).boxes.tolist()]


POINTS = {
    (1, 2): " 0.45 0.45",
    (4, 3): " 0.45 0.45 2 0.5 0.6 1 0.55 0.35 2 0 0 0",
    (6, 2): " 0.45 0.45 0.5 0.6 0.55 0.35 0 0 0.41 0.5 0.6 0.31",
    (17, 2): " 0.45 0.45" * 17,
    (1, 3): " 0.45 0.45 2",
}


@pytest.mark.parametrize("shape", POINTS)
def test_key_points_follow_a_box(root, shape):
    for name in "ab":
        (root / f"labels/train/{name}.txt").write_text(f"{LINE}{POINTS[shape]}\n{LINE}{POINTS[shape]}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert boxes(read(root, points=shape)) == boxes(read(root, keypoints=True)) == [BOX, BOX]
    with pytest.warns(UserWarning, match=r"4 line\(s\) of \d+ numbers are taken for boxes with key points, and might"):
        assert boxes(read(root)) == [BOX, BOX]


def test_polygons_are_no_key_points(root):
    quad = "0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9"  # a rotated box, as four corners
    (root / "labels/train/a.txt").write_text(f"{POLYGON}\n")
    (root / "labels/train/b.txt").write_text(f"{quad}\n")
    files = read(root)
    assert (boxes(files), boxes(files, 1)) == ([[4, 2, 24, 18]], [[4, 2, 36, 18]])
    (root / "labels/train/a.txt").write_text("0 0.4 0.4 0.5 0.4 0.5 0.5 0.4 0.5\n")
    assert boxes(read(root)) == [[16, 8, 20, 10]]
    (root / "labels/train/a.txt").write_text(f"{LINE} 0.45 0.45\n")
    assert boxes(read(root, keypoints=False)) == [[8, 8, 20, 10]]


def test_the_shape_of_data_yaml_decides_and_is_checked(root):
    (root / "data.yaml").write_text("names: [cat]\nkpt_shape: [1, 2]\n")
    for split in ("train", "val"):
        (root / f"labels/{split}/a.txt").write_text(f"{LINE} 0.45 0.45\n")
    assert train_boxes(root)[0] == [pytest.approx(BOX)]
    (root / "labels/train/b.txt").write_text(f"{LINE} 0.45 0.45 2\n")
    with pytest.raises(ValueError, match=r"b.txt: line 1 has 8 numbers; with kpt_shape \[1, 2\]"):
        module(root)
    (root / "data.yaml").write_text("names: [cat]\nkpt_shape: 17\n")
    with pytest.raises(ValueError, match=r"kpt_shape is 17; write \[n, 2\]"):
        read_yolo_layout(root / "data.yaml")


def test_train_decides_for_all_splits(root):
    for name in "ab":
        (root / f"labels/train/{name}.txt").write_text(f"{LINE} 0.45 0.45\n")
        (root / f"labels/val/{name}.txt").write_text(f"{LINE} 0.9 0.95\n")  # out of its box
    with pytest.warns(UserWarning, match="might be polygons"):
        assert train_boxes(root) == [[pytest.approx(BOX)]] * 2


@pytest.mark.parametrize("place", ["images/train/b.txt", "labels/train/b.png.txt", "labels/train/b.TXT"])
def test_labels_are_found_beside_and_by_other_names(root, place):
    (root / "labels/train/b.txt").rename(root / place)
    files = read(root)
    assert boxes(files) == boxes(files, 1) == [BOX]


OTHER = "0 0.25 0.5 0.5 1"  # the left half


def test_labels_of_names_that_differ_in_case_stay_apart(root):
    write(root, "images/train/A.png", "labels/train/A.txt", OTHER)
    files = read(root)  # A, a, b
    assert [boxes(files, index) for index in range(3)] == [[[0, 0, 20, 20]], [BOX], [BOX]]
    (root / "labels/train/A.txt").unlink()
    assert [boxes(read(root), index) for index in range(3)] == [[], [BOX], [BOX]]
    (root / "images/train/a.png").unlink()
    assert boxes(read(root)) == [BOX]  # the only image that can be meant


def test_of_labels_that_differ_in_case_only_the_exact_one_is_taken(root):
    (root / "labels/train/b.txt").rename(root / "labels/train/B.TXT")
    write(root, "images/val/B.png", "labels/train/B.txt", OTHER)
    assert boxes(read(root), 1) == [[0, 0, 20, 20]]
    (root / "images/train/b.png").rename(root / "images/train/B.png")
    (root / "labels/train/b.txt").write_text(LINE)
    assert boxes(read(root)) == [[0, 0, 20, 20]]


def test_labels_of_no_image_are_told(root):
    (root / "labels/train/b.txt").rename(root / "labels/train/c.txt")
    with pytest.warns(UserWarning, match=r"1 of 2 images have no label file .* 1 label file\(s\) .*c.txt"):
        assert boxes(read(root), 1) == []


def test_hidden_files_beside_the_labels_are_passed_over(root):
    (root / "labels/train/b.txt").unlink()
    for name in ("._a.txt", "._b.txt"):  # as macOS writes them into archives
        (root / "labels/train" / name).write_bytes(b"\x00\x05\x16\x07")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [boxes(read(root), index) for index in range(2)] == [[BOX], []]


@pytest.mark.parametrize("number", ["0.0", "0.000e+00", "0"])
def test_whole_numbers_in_any_spelling(root, number):
    (root / "labels/train/a.txt").write_text(f"{number} 0.5 0.5 0.2 0.4\n")
    assert boxes(read(root)) == [BOX]


@pytest.mark.parametrize("number", ["0.5", "nan", "inf", "-1e999"])
def test_no_whole_number(root, number):
    (root / "labels/train/a.txt").write_text(f"{number} 0.5 0.5 0.2 0.4\n")
    with pytest.raises(ValueError, match=r"a.txt: line 1 is .*write a whole number"):
        read(root)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("0 0.5 0.5 0.2", "has 4 numbers"),
        ("0 20 10 8 8", "which are pixels"),
        ("0,0.5,0.5,0.2,0.4", "with commas"),
        ("0 0,5 0,5 0,2 0,4", "with commas"),
        ("7 0.5 0.5 0.2 0.4", "is of class 7"),
        ("0 0.5 0.5 0.2 " + "0.4 " * 10**5, "has 100004 numbers"),
    ],
)
def test_a_bad_line_is_named_or_left_out(root, line, what):
    (root / "labels/train/a.txt").write_text(f"{LINE}\n{line}\n")
    with pytest.raises(ValueError, match=rf"labels/train/a.txt: line 2 .*{what}") as raised:
        module(root)
    assert len(str(raised.value)) < 500
    with pytest.warns(UserWarning, match=rf"1 box\(es\) are left out; the first: .*line 2 .*{what}"):
        data = module(root, on_bad_image="skip")
    assert len(data.dropped) == 1
    assert data.train_dataloader().sampler.size == 2


def test_a_label_file_that_is_no_text_takes_its_image_along(root):
    (root / "labels/train/a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a.txt: no text in UTF-8 .*; save it as UTF-8"):
        module(root)
    with pytest.warns(UserWarning, match=r"1 of 2 images are left out:\s.*a.txt: no text"):
        data = module(root, on_bad_image="skip")
    assert data.train_dataloader().sampler.size == 1


def test_test_images_that_roboflow_names_and_does_not_export(root):
    (root / "data.yaml").write_text(
        "names: {'0': cat}\ntrain: ../images/train\nval: ../images/val\ntest: ../test/images\n"
    )
    data = module(root)
    assert data.classes == ("cat",)
    with pytest.raises(FileNotFoundError, match="test/images"):
        module(root, test="test/images")


@pytest.mark.parametrize("text", ["path: sub\ntrain: images/train\nval: images/val\n", "path: sub\n", "path: ./sub\n"])
def test_the_path_of_data_yaml_is_a_folder_below(root, text):
    (root / "sub").mkdir()
    for name in ("images", "labels"):
        (root / name).rename(root / "sub" / name)
    (root / "data.yaml").write_text(text + "names: [cat]\n")
    assert train_boxes(root) == [[pytest.approx(BOX)]] * 2


ELSEWHERE = [
    ("path: ../{root}\ntrain: images/train\nval: images/val\n", False),
    ("path: ../{root}\n", False),
    ("train: {root}/images/train\nval: {root}/images/val\n", True),
    ("train: /content/datasets/foo-1/images/train\nval: [../../x/foo-1/images/val]\n", True),
    ("path: /content/datasets/foo\ntrain: images/train\nval: images/val\n", False),
    ("path: 'C:\\foo'\ntrain: data\\images\\train\nval: ../images/val\n", True),
]


@pytest.mark.parametrize(("text", "warned"), ELSEWHERE)
def test_places_of_where_the_data_were_made(root, text, warned):
    (root / "data.yaml").write_text(text.format(root=root.name) + "names: [cat]\n")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert train_boxes(root) == [[pytest.approx(BOX)]] * 2
    texts = [str(one.message) for one in said]
    assert len(texts) == warned
    assert all("data.yaml: not all of its places are in" in one and "'images/train' for" in one for one in texts)


def test_places_of_which_nothing_is_there_are_named_with_their_file(root):
    write(root.parent, "elsewhere/train/a.png", "elsewhere/train/a.txt")
    for place in ("../elsewhere/train", str(root.parent / "elsewhere/train"), "gone", "/content/train/images"):
        (root / "data.yaml").write_text(f"names: [cat]\ntrain: {place}\n")
        with pytest.raises(FileNotFoundError, match=rf"data\.yaml: train is '{place}', but neither"):
            module(root)
    (root / "data.yaml").write_text("names: [cat]\nval: /content/x/valid/images\n")
    with pytest.raises(FileNotFoundError, match=r"data\.yaml: val is .*, or set val_share=0\.1"):
        module(root)
    assert module(root, val="images/val").classes == ("cat",)


def test_an_end_of_several_places_is_not_taken(root):
    (root / "images/data").mkdir()
    (root / "data.yaml").write_text("names: [cat]\ntrain: /x/a/images/data\nval: /x/b/images/data\n")
    with pytest.raises(FileNotFoundError, match=r"data\.yaml: train is '/x/a/images/data'"):
        module(root)


@pytest.mark.parametrize("moved", [("images/val", "images/valid"), ("images/val", "valid/images")])
def test_the_evaluation_images_may_be_called_valid(root, moved):
    for kind in ("images", "labels"):
        old, new = (root / one.replace("images", kind) for one in moved)
        new.parent.mkdir(exist_ok=True)
        old.rename(new)
    assert train_boxes(root) == [[pytest.approx(BOX)]] * 2
    (root / "data.yaml").write_text(f"names: [cat]\nvalid: {moved[1]}\n")
    assert train_boxes(root) == [[pytest.approx(BOX)]] * 2


def test_what_cvat_exports(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, f"obj_{split}_data/a.png", f"obj_{split}_data/a.txt")
        (tmp_path / f"{split}.txt").write_text(f"data/obj_{split}_data/a.png\n")
    (tmp_path / "obj.names").write_text("cat\n")
    assert train_boxes(tmp_path) == [[pytest.approx(BOX)]]
    (tmp_path / "train.txt").write_text("data/../../secret.png\n")
    with pytest.raises(ValueError, match="is no file inside"):
        module(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "names"),
    [
        ("images", "labels", "classes.txt"),  # of Label Studio
        ("images", "labels", "labels/classes.txt"),  # of LabelImg
        (".", ".", "classes.txt"),
    ],
)
def test_what_annotation_tools_save(tmp_path, images, labels, names):
    for name in "abcd":
        write(tmp_path, f"{images}/{name}.png", f"{labels}/{name}.txt")
    (tmp_path / labels / "d.txt").unlink()
    (tmp_path / names).write_text("cat\n\n")
    with pytest.raises(FileNotFoundError, match=r"images/train: no such folder; set val_share=0\.1 to train on all"):
        module(tmp_path)
    data = module(tmp_path, val_share=0.5)
    assert data.classes == ("cat",)
    assert [loader.sampler.size for loader in (data.train_dataloader(), data.val_dataloader())] == [2, 2]
    (tmp_path / names).write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match=r"classes\.txt: line 2 is empty"):
        module(tmp_path)


def test_what_fiftyone_exports(root):
    (root / "data.yaml").unlink()
    with pytest.raises(ValueError, match=r"data\.yaml: no such file, or no names in it; .*classes\.txt, one a line"):
        module(root)
    text = "names:\n  0: cat\npath: /home/u/birds\ntrain: ./images/train/\nvalidation: ./images/val/\n"
    (root / "dataset.yaml").write_text(text)
    assert train_boxes(root) == [[pytest.approx(BOX)]] * 2
    assert module(root).classes == ("cat",)


def test_aliases_of_yaml_do_not_grow(root):
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    (root / "data.yaml").write_text(f"l0: &l0 [a]\n{levels}names: *l29\n")
    with pytest.raises(ValueError, match="its aliases stand for more than") as raised:
        module(root)
    assert len(str(raised.value)) < 1_000


def test_links_may_lead_out_where_it_is_allowed(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("cache") / "0a1b"
    (root / "images/train/a.png").rename(elsewhere)
    (root / "images/train/a.png").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"outside of .*follow_links=true"):
        module(root)
    assert module(root, follow_links=True).train_dataloader().sampler.size == 2
    with pytest.raises(ValueError, match="is no file inside"):
        module(root, follow_links=True, train="../x")
