import copy
import json
from unicodedata import normalize

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from diffkd.data.detection.annotated_files import ReadBox, ReadImage, annotated_files
from diffkd.data.detection.coco import _box_of_runs, read_coco

CONTENT = {
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "cow"}],
    "images": [
        {"id": 50, "file_name": "a.jpg", "width": 20, "height": 10},
        {"id": 4, "file_name": "sub/b.jpg", "width": 8, "height": 8},
        {"id": -2, "file_name": "c.jpg", "width": 5, "height": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 4, "category_id": 90, "bbox": [1.25, 2.5, 3.125, 4.75], "area": 6.5, "iscrowd": 1},
        {"id": 2, "image_id": 50, "category_id": 3, "bbox": [0, 0, 20, 10], "segmentation": {"counts": [1], "size": 3}},
        {"id": 3, "image_id": 4, "category_id": 7, "bbox": [-2, 4, 30, 2], "area": 0},
    ],
}


@pytest.fixture
def read(tmp_path):
    def write_and_read(content, categories=None, **options):
        file = tmp_path / "boxes.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_coco(file, tmp_path, categories, **options)

    return write_and_read


def changed(*path, to=None, without=None):
    content = copy.deepcopy(CONTENT)
    entry = content
    for key in path[:-1] if without is None else path:
        entry = entry[key]
    if without is None:
        entry[path[-1]] = to
    else:
        del entry[without]
    return content


def test_what_is_in_a_file(read, tmp_path):
    files = read(CONTENT)
    assert (files.classes, files.category_ids) == (("cat", "dog", "cow"), (3, 7, 90))
    assert files.paths == tuple(str(tmp_path / name) for name in ("a.jpg", "sub/b.jpg", "c.jpg"))
    assert files.sizes.tolist() == [[10, 20], [8, 8], [6, 5]]
    assert files.annotations.image_ids.tolist() == [50, 4, -2]
    assert files.dropped == ()
    first, second, third = (files.annotations.of(index) for index in range(3))
    assert first.boxes.tolist() == [[0, 0, 20, 10]]
    assert first.area.tolist() == [200]
    assert second.boxes.tolist() == [[1.25, 2.5, 4.375, 7.25], [0, 4, 8, 6]]  # the second is cut at the border
    assert second.labels.tolist() == [3, 2]
    assert second.area.tolist() == [6.5, 16]
    assert second.iscrowd.tolist() == [1, 0]
    assert third.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("said", "crowd"), [(0, 0), ("0", 0), (False, 0), (None, 0), ("false", 0), (1, 1), ("1", 1), (True, 1), (1.0, 1)]
)
def test_crowds_are_said_by_numbers_texts_or_truth_values(read, said, crowd):
    content = changed("annotations", 0, "iscrowd", to=said)
    assert read(content).annotations.of(1).iscrowd.tolist() == [crowd, 0]


def test_ignored_boxes_are_crowds(read):
    assert read(changed("annotations", 1, "ignore", to=1)).annotations.of(0).iscrowd.tolist() == [1]
    assert read(changed("annotations", 1, "ignore", to=0)).annotations.of(0).iscrowd.tolist() == [0]
    assert read(changed("annotations", 0, "ignore", to=0)).annotations.of(1).iscrowd.tolist() == [1, 0]
    with pytest.raises(ValueError, match="annotation 1 has ignore 'some'; write 0 or 1"):
        read(changed("annotations", 1, "ignore", to="some"))


@pytest.mark.parametrize("said", ["no", 2, -1, [0], {}])
def test_other_crowds_are_refused(read, said):
    with pytest.raises(ValueError, match=r"boxes\.json: annotation 0 has iscrowd .*; write 0 or 1"):
        read(changed("annotations", 0, "iscrowd", to=said))


def test_boxes_without_extent_inside_the_image_are_dropped_and_named(read):
    content = copy.deepcopy(CONTENT)
    bad = [[1, 1, 0, 2], [1, 1, -3, 2], [float("nan"), 1, 2, 2], [8, 0, 4, 4], [-5, 0, 5, 4], [1, 1, float("inf"), 1]]
    bad.append([10**400, 1, 1, 1])
    for index, bbox in enumerate(bad):
        content["annotations"].insert(1, {"id": 100 + index, "image_id": 4, "category_id": 3, "bbox": bbox})
    files = read(content)
    assert len(files.dropped) == len(bad)
    assert {int(message.split("box ")[1].split(" of ")[0]) for message in files.dropped} == set(range(100, 107))
    assert all("sub/b.jpg" in message and "8x8 image" in message for message in files.dropped)
    for index in range(3):
        for got, plain in zip(files.annotations.of(index), read(CONTENT).annotations.of(index), strict=True):
            assert torch.equal(got, plain)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "holds a list"),
        (changed(without="images"), "lacks 'images'; it has 'categories', 'annotations'"),
        (changed(without="annotations"), "lacks 'annotations'"),
        (changed("images", to={}), "'images' is a dict"),
        (changed("images", to=[3]), "entry 0 of 'images' is a int"),
        (changed("images", to=[]) | {"annotations": []}, "no images"),
        (changed("categories", to=[]), "no categories"),
        (changed("images", 1, without="file_name"), "image 1 lacks 'file_name'"),
        (changed("images", 1, "file_name", to="../b.jpg"), "'../b.jpg' is no file inside"),
        (changed("images", 1, "file_name", to=5), "image 1 has the file name 5"),
        (changed("images", 1, "width", to=0), "image 1 has the width 0"),
        (changed("images", 1, without="width"), "image 1 lacks 'width'"),
        (changed("images", 1, "height", to="tall"), "image 1 has the height 'tall'"),
        (changed("images", 1, "height", to=float("nan")), "image 1 has the height nan"),
        (changed("images", 1, "id", to=50), "image 1 has the id 50 of another"),
        (changed("images", 1, "id", to="x"), "image 1 has the id 'x'"),
        (changed("images", 1, "id", to=2**70), "integers of 64 bits"),
        (changed("categories", 1, "id", to=7), "category 1 has the id 7 of another"),
        (changed("categories", 1, without="name"), "category 1 lacks 'name'"),
        (changed("annotations", 2, "image_id", to=5), "annotation 2 is of image 5"),
        (changed("annotations", 2, "image_id", to=[]), r"annotation 2 is of image \[\]"),
        (changed("annotations", 2, "category_id", to=1), "annotation 2 is of category 1"),
        (changed("annotations", 2, without="bbox"), "annotation 2 lacks 'bbox'"),
        (changed("annotations", 2, "bbox", to=[1, 2, 3]), r"annotation 2 has the bbox \[1, 2, 3\]"),
        (changed("annotations", 2, "bbox", to=[1, 2, 3, None]), "annotation 2 has the bbox"),
    ],
)
def test_files_that_contradict_themselves_are_refused(read, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(content)
    assert "boxes.json" in str(caught.value)


@pytest.mark.parametrize("stated", [{}, {"width": 0, "height": 0}, {"width": None, "height": None}])
def test_sizes_that_are_not_stated_are_those_of_the_files(read, tmp_path, stated):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "sub" / "b.jpg")
    entry = {"id": 4, "file_name": "sub\\b.jpg"} | stated
    files = read(changed("images", 1, to=entry))
    assert files.paths[1] == str(tmp_path / "sub/b.jpg")
    assert files.sizes.tolist() == [[10, 20], [6, 8], [6, 5]]
    assert files.annotations.of(1).boxes.tolist() == [[1.25, 2.5, 4.375, 6], [0, 4, 8, 6]]


def test_without_a_size_broken_files_are_refused_or_left_to_whoever_skips_them(read, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jpg").write_text("no image")
    content = changed("images", 1, to={"id": 4, "file_name": "sub/b.jpg"})
    with pytest.raises(ValueError, match=r"b\.jpg cannot be read"):
        read(content)
    files = read(content, skip_bad=True)
    assert files.sizes[1].tolist() == [0, 0]
    assert files.dropped == ()
    assert files.annotations.of(1).boxes.shape == (0, 4)
    assert files.annotations.of(0).boxes.shape == (1, 4)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.json: no such file"):
        read_coco(tmp_path / "gone.json", tmp_path)


def test_categories_follow_the_training_file(read):
    training = {3: "cat", 5: "bird", 7: "dog", 90: "cow"}
    files = read(CONTENT, training)
    assert files.classes == ("cat", "bird", "dog", "cow")
    assert files.annotations.of(1).labels.tolist() == [4, 3]
    with pytest.raises(ValueError, match="category 90, 'cow', does not exist in the training file"):
        read(CONTENT, {3: "cat", 7: "dog"})
    with pytest.raises(ValueError, match="category 3, 'cat', is 'bat' in the training file"):
        read(CONTENT, training | {3: "bat"})


def test_categories_of_other_ids_are_found_by_name(read):
    training = {1: "cow", 3: "dog", 7: "cat"}
    with pytest.warns(UserWarning, match=r"3 of its categories have other ids .*'dog' is 7 here and 3 there"):
        files = read(CONTENT, training)
    assert (files.classes, files.category_ids) == (("cow", "dog", "cat"), (1, 3, 7))
    assert [files.annotations.of(index).labels.tolist() for index in range(3)] == [[3], [1, 2], []]
    with pytest.raises(ValueError, match="category 7, 'dog', is 'cat' in the training file"):
        read(CONTENT, training | {8: "cat"})  # of which 'cat' is not said


numbers = st.floats(-50, 150, width=32)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=8), st.integers(1, 99), st.integers(1, 99))
def test_every_box_is_either_kept_inside_or_dropped(corners, height, width):
    boxes = [ReadBox(box, 1, index) for index, box in enumerate(corners)]
    files = annotated_files("x", [ReadImage("a", (height, width), 0, boxes)], ["a"], [1])
    kept = files.annotations.of(0)
    assert len(kept.boxes) + len(files.dropped) == len(corners)
    assert (kept.boxes[:, 2:] > kept.boxes[:, :2]).all()
    assert ((kept.boxes >= 0) & (kept.boxes <= torch.tensor([width, height] * 2))).all()
    inner = [box for box in corners if 0 <= box[0] < box[2] - 1 and 0 <= box[1] < box[3] - 1]
    for box in inner:
        if box[2] <= width and box[3] <= height:
            assert list(box) in kept.boxes.tolist()


@pytest.mark.parametrize("kind", [str, float])
def test_ids_may_be_texts_or_floats_of_whole_numbers(read, kind):
    content = copy.deepcopy(CONTENT)
    for one in content["categories"] + content["images"]:
        one["id"] = kind(one["id"])
    content["annotations"][1]["category_id"] = kind(3)
    for one in content["annotations"]:
        one["image_id"] = kind(one["image_id"])
    if kind is float:
        content["annotations"][0]["image_id"] = "4"
    files, plain = read(content), read(CONTENT)
    assert files.category_ids == plain.category_ids
    assert torch.equal(files.annotations.image_ids, plain.annotations.image_ids)
    assert torch.equal(files.annotations.boxes.boxes, plain.annotations.boxes.boxes)


def test_images_may_have_any_texts_as_ids(read):
    content = copy.deepcopy(CONTENT)
    for one in content["images"]:
        one["id"] = f"image {one['id']}"
    for one in content["annotations"]:
        one["image_id"] = f"image {one['image_id']}"
    assert [len(read(content).annotations.of(index).labels) for index in range(3)] == [1, 2, 0]
    content["annotations"][0]["image_id"] = "image 7"
    with pytest.raises(ValueError, match="annotation 0 is of image 'image 7', which is not among"):
        read(content)
    content["images"][1]["id"] = content["images"][0]["id"]
    with pytest.raises(ValueError, match="of another one"):
        read(content)


@pytest.mark.parametrize("bbox", [[], None, "absent"])
def test_a_polygon_stands_in_for_a_missing_box(read, bbox):
    entry = {"id": 2, "image_id": 50, "category_id": 3, "bbox": bbox, "segmentation": [[1, 2, 9, 3, 5, 8], [0, 4]]}
    if bbox == "absent":
        del entry["bbox"]
    assert read(changed("annotations", 1, to=entry)).annotations.of(0).boxes.tolist() == [[1, 2, 9, 8]]


def test_an_annotation_of_nothing_is_left_out(read):
    files = read(changed("annotations", 1, "bbox", to=[]))
    assert len(files.annotations.of(0).labels) == 0
    assert len(files.dropped) == 1
    assert "annotation 1 has neither a box nor a polygon" in files.dropped[0]


@pytest.mark.parametrize(
    ("key", "value"), [("bbox", [1, 2, 3]), ("bbox", "x"), ("category_id", 1), ("image_id", None), ("iscrowd", "no")]
)
def test_a_bad_annotation_is_left_out_where_such_are_skipped(read, key, value):
    files = read(changed("annotations", 0, key, to=value), skip_bad=True)
    assert len(files.annotations.boxes.labels) == 2
    assert len(files.dropped) == 1
    assert "annotation 0" in files.dropped[0]


def test_chosen_categories(read):
    files = read(CONTENT, chosen=("dog", "cow"))
    assert (files.classes, files.category_ids) == (("dog", "cow"), (7, 90))
    assert [files.annotations.of(index).labels.tolist() for index in range(3)] == [[], [2, 1], []]
    assert read(CONTENT, {7: "dog", 90: "cow"}, chosen=("dog", "cow")).classes == ("dog", "cow")
    with pytest.raises(ValueError, match="no categories 'bird'; there are 'dog', 'cat', 'cow'"):
        read(CONTENT, chosen=("dog", "bird"))


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_the_stored_picture_are_turned_along(read, tmp_path, orientation, stated):
    image, exif = Image.new("L", (20, 10)), Image.Exif()
    exif[0x0112] = orientation
    image.paste(255, (3, 1, 8, 5))
    image.save(tmp_path / "a.png", exif=exif)
    entry = {"id": 50, "file_name": "a.png"} | ({"width": 20, "height": 10} if stated else {})
    content = {
        "images": [entry],
        "categories": CONTENT["categories"],
        "annotations": [{"id": 1, "image_id": 50, "category_id": 3, "bbox": [3, 1, 5, 4]}],
    }
    files = read(content, as_stored=True)
    pixels = files.read(0)[0]
    rows, columns = pixels.nonzero().unbind(1)
    around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert files.annotations.of(0).boxes[0].tolist() == around
    if stated and orientation > 4:
        with pytest.raises(ValueError, match=r"set boxes_as_stored=true"):
            read(content).read(0)


# A mask of 3x4 pixels, with ones in rows 1 and 2 of column 1 and in row 2 of column 2: zeros, ones, zeros, ...
RUNS = [4, 2, 2, 1, 3]


def compressed(runs):
    """Write the counts as COCO's text, by its definition: differences in groups of 5 bits, the lowest first."""
    text = ""
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        done = False
        while not done:
            group, value = value & 31, value >> 5
            done = value == (-1 if group & 16 else 0)
            text += chr(48 + (group | (0 if done else 32)))
    return text


@pytest.mark.parametrize("counts", [RUNS, compressed(RUNS)])
@pytest.mark.parametrize("bbox", [[], "absent"])
def test_a_mask_stands_in_for_a_missing_box(read, counts, bbox):
    entry = {
        "id": 2,
        "image_id": 50,
        "category_id": 3,
        "bbox": bbox,
        "segmentation": {"size": [3, 4], "counts": counts},
    }
    if bbox == "absent":
        del entry["bbox"]
    assert read(changed("annotations", 1, to=entry)).annotations.of(0).boxes.tolist() == [[1, 1, 3, 3]]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 12))
def test_boxes_of_masks_are_those_of_their_pixels(runs, height):
    runs = [*runs, -sum(runs) % height]
    width = sum(runs) // height
    assume(width > 0)
    pixels = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
    rows, columns = np.nonzero(pixels)
    expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None
    for counts in (runs, compressed(runs)):
        assert _box_of_runs({"size": [height, width], "counts": counts}) == expected


@pytest.mark.parametrize("counts", [[3], [4, 2, 2, 1, 4], [-1, 13], ["a"], None, "0", "\x7f", "\u00e9", "o" * 50, 3])
def test_counts_that_are_of_no_mask_make_no_box(counts):
    assert _box_of_runs({"size": [3, 4], "counts": counts}) is None


def test_sizes_and_areas_may_be_texts_of_numbers(read, tmp_path):
    stated = changed("images", 0, "height", to="10")
    stated["images"][0]["width"] = "20.0"
    stated["annotations"][0]["area"] = "6.5"
    files = read(stated)
    assert files.sizes.tolist() == [[10, 20], [8, 8], [6, 5]]
    assert files.annotations.of(1).area.tolist() == [6.5, 16]
    Image.new("RGB", (20, 30)).save(tmp_path / "a.jpg")
    stated["images"][0] |= {"width": "0", "height": "0"}
    assert read(stated).sizes[0].tolist() == [30, 20]


def test_boxes_may_be_texts_of_numbers(read):
    stated = changed("annotations", 1, "bbox", to=["0", "0.0", "20", "1e1"])
    assert read(stated).annotations.of(0).boxes.tolist() == [[0, 0, 20, 10]]
    with pytest.raises(ValueError, match="has the bbox"):
        read(changed("annotations", 1, "bbox", to=["0", "0", "20", "wide"]))


def test_file_names_may_repeat_the_name_of_their_folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 10)).save(folder / "a.png")
    content = {"categories": [{"id": 1, "name": "cat"}], "annotations": []}
    content["images"] = [{"id": 1, "file_name": "images/a.png", "width": 20, "height": 10}]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert read_coco(tmp_path / "boxes.json", folder).paths == (str(folder / "a.png"),)
    (folder / "images").mkdir()
    Image.new("RGB", (20, 10)).save(folder / "images" / "a.png")  # now it is the name of this one
    assert read_coco(tmp_path / "boxes.json", folder).paths == (str(folder / "images" / "a.png"),)


def test_file_names_of_lvis_are_in_its_urls(read, tmp_path):
    urls = ["http://images.cocodataset.org/train2017/000000391895.jpg", "x.jpg?size=2", "http://x/val2017/2.jpg"]
    content = copy.deepcopy(CONTENT)
    for entry, url in zip(content["images"], urls, strict=True):
        del entry["file_name"]
        entry["coco_url"] = url
    assert read(content).paths == tuple(str(tmp_path / name) for name in ("000000391895.jpg", "x.jpg", "2.jpg"))
    (tmp_path / "train2017").mkdir()
    assert read(content).paths[0] == str(tmp_path / "train2017/000000391895.jpg")
    content["images"][0]["coco_url"] = "http://x/../secret.jpg"
    with pytest.raises(ValueError, match=r"'\.\./secret\.jpg' is no file inside"):
        read(content)
    content["images"][0]["coco_url"] = 5
    with pytest.raises(ValueError, match=r"image 0 lacks 'file_name'; it has .*'coco_url'"):
        read(content)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_may_be_composed_otherwise_on_the_disk(read, tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (tmp_path / normalize(other, "été")).mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / normalize(other, "été/Zoë.png"))
    content = changed("images", 0, "file_name", to=normalize(form, "été/Zoë.png"))
    assert read(content).paths[0] == str(tmp_path / normalize(other, "été/Zoë.png"))
    Image.new("RGB", (20, 10)).save(tmp_path / normalize(other, "été") / normalize(form, "Zoë.png"))
    assert read(content).paths[0] == str(tmp_path / normalize(other, "été") / normalize(form, "Zoë.png"))
    content = changed("images", 0, "file_name", to="../été.png")
    with pytest.raises(ValueError, match="is no file inside"):
        read(content)
    assert read(changed("images", 0, "file_name", to="gone/é.png")).paths[0] == str(tmp_path / "gone/é.png")


def test_categories_of_one_name_are_told_of(read):
    with pytest.warns(UserWarning, match="several categories are named 'cat'"):
        read(changed("categories", 0, "name", to="cat"))
