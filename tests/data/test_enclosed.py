import json
import re

import pytest

from diffkd.data import VocSegmentation
from diffkd.data.detection.coco import read_coco
from diffkd.data.detection.voc import find_voc_split, read_voc
from diffkd.data.detection.yolo import read_yolo
from diffkd.data.folders import enclosed_files, enclosed_folder, is_file, is_there


def test_names_become_paths_whether_or_not_they_exist(tmp_path):
    (tmp_path / "night").mkdir()
    names = ["a.jpg", "night/b.jpg", "./c.jpg", "night/b.jpg", "gone/d..e.jpg"]
    found = enclosed_files(tmp_path, names, "x.json")
    assert found == [str(tmp_path / name) for name in ("a.jpg", "night/b.jpg", "c.jpg", "night/b.jpg", "gone/d..e.jpg")]


def test_names_written_on_windows_are_understood(tmp_path):
    (tmp_path / "as\\stored.jpg").touch()
    found = enclosed_files(tmp_path, ["night\\late\\a.jpg", ".\\b.jpg", "as\\stored.jpg"], "x.json")
    assert found == [str(tmp_path / name) for name in ("night/late/a.jpg", "b.jpg", "as\\stored.jpg")]


@pytest.mark.parametrize(
    "name", ["..\\a.jpg", "b\\..\\..\\a.jpg", "C:\\a.jpg", "\\a.jpg", "\\\\host\\share\\a.jpg", "C:b\\a.jpg"]
)
def test_names_written_on_windows_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"x.json: file name .* is no file inside"):
        enclosed_files(tmp_path, ["good.jpg", name], "x.json")


@pytest.mark.parametrize("name", ["../a.jpg", "b/../../a.jpg", "/etc/passwd", "", ".", "a\0.jpg", ".."])
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"x.json: file name .* is no file inside") as caught:
        enclosed_files(tmp_path, ["good.jpg", name], "x.json")
    assert repr(name) in str(caught.value)


def test_links_that_lead_out_are_refused_and_others_are_not(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "images"
    outside.mkdir()
    folder.mkdir()
    (outside / "secret.jpg").touch()
    (folder / "real.jpg").touch()
    (folder / "inner.jpg").symlink_to("real.jpg")
    (folder / "link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "linked").symlink_to(outside)
    assert len(enclosed_files(folder, ["real.jpg", "inner.jpg"], "x")) == 2
    for name in ("link.jpg", "linked/secret.jpg", "linked\\secret.jpg"):
        with pytest.raises(ValueError, match=f"x: file name {re.escape(repr(name))}.*outside"):
            enclosed_files(folder, ["real.jpg", name], "x")


def test_a_linked_folder_needs_its_absolute_path(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (root / "images").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"outside of .*give its absolute path"):
        enclosed_folder(root, "images")
    assert enclosed_folder(root, str(elsewhere)) == elsewhere
    with pytest.raises(FileNotFoundError, match="pictures: no such folder"):
        enclosed_folder(root, "pictures")


LONG = ("n" * 300, "/".join(["n" * 200] * 30))  # a name and a path that no file system takes


@pytest.mark.parametrize("name", LONG)
def test_of_a_name_that_is_too_long_there_is_no_file(name, tmp_path):
    (path,) = enclosed_files(tmp_path, [name], "x.json")
    assert not is_file(path)
    assert not is_there(path)


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("as_stored", [False, True])
def test_coco_names_that_are_too_long_are_missing_images(name, as_stored, tmp_path):
    (tmp_path / "images").mkdir()
    content = {"images": [{"id": 1, "file_name": name}], "categories": [{"id": 1, "name": "a"}], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps(content))
    files = read_coco(tmp_path / "a.json", tmp_path / "images", as_stored=as_stored)
    assert files.paths == (str(tmp_path / "images" / name),)


@pytest.mark.parametrize("name", LONG)
def test_voc_names_that_are_too_long_are_missing_files(name, tmp_path):
    for folder in ("Annotations", "JPEGImages", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for task in ("Main", "Segmentation"):
        (tmp_path / "ImageSets" / task / "train.txt").write_text(f"{name}\n")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_voc(find_voc_split(tmp_path, "train"))
    with pytest.raises(ValueError, match=r"train.txt: 2 of the files it names are missing"):
        VocSegmentation(tmp_path, train="train", val="train")


@pytest.mark.filterwarnings("ignore:.*no image has a file of labels")
@pytest.mark.parametrize("name", LONG)
def test_yolo_names_that_are_too_long_are_missing_files(name, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "train.txt").write_text(f"images/{name}.jpg\n")
    with pytest.raises(ValueError, match=r"image .*images"):
        read_yolo(tmp_path, ["train.txt"], ["a"])
