import os
from pathlib import Path

import pytest

from diffkd.data.folders import image_files, scan_folder


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "root" / split / name
            folder.mkdir(parents=True)
            for file in ("b.png", "a.JPG"):
                (folder / file).touch()
    return tmp_path / "root"


def test_classes_and_files_are_sorted(root):
    (root / "train" / "cat" / "more").mkdir()
    (root / "train" / "cat" / "more" / "c.webp").touch()
    for ignored in (".DS_Store", ".hidden.png", "notes.txt"):
        (root / "train" / "cat" / ignored).touch()
    (root / "train" / ".cache").mkdir()
    with pytest.warns(UserWarning, match=r"root: 1 file\(s\) are passed over, .* \('.txt'\)"):
        classes, train, val = scan_folder(root)
    assert classes == ("cat", "dog")
    names = [str(Path(path).relative_to(root / "train")) for path in train.paths]
    assert names == ["cat/a.JPG", "cat/b.png", "cat/more/c.webp", "dog/a.JPG", "dog/b.png"]
    assert train.labels == [0, 0, 0, 1, 1]
    assert val.labels == [0, 0, 1, 1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_of_no_class_are_told_of(root, split):
    for name in ("b.jpg", "a.png", ".hidden.png", "list.txt"):
        (root / split / name).touch()
    with pytest.warns(UserWarning, match=rf"{split}: 2 image\(s\) beside .* \('a.png', 'b.jpg'\); move them") as seen:
        scan = scan_folder(root)
    assert len(seen) == 1
    assert (len(scan.train.paths), len(scan.val.paths)) == (4, 4)


def test_the_evaluation_images_may_have_any_of_the_usual_names(root):
    (root / "val").rename(root / "test")
    assert scan_folder(root).val.paths[0].startswith(str(root / "test"))
    (root / "valid" / "cat").mkdir(parents=True)
    (root / "valid" / "cat" / "a.png").touch()
    assert scan_folder(root).val.paths == [str(root / "valid" / "cat" / "a.png")]


def test_missing_folders_are_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"elsewhere/train: no such folder"):
        scan_folder(tmp_path / "elsewhere")
    (root / "val").rename(root / "evaluation")
    with pytest.raises(FileNotFoundError, match=r"val: no such folder.*or valid/, validation/, test/"):
        scan_folder(root)


def test_a_split_without_classes(root):
    for path in (root / "train").rglob("*.*"):
        path.rename(root / "train" / f"{path.parent.name}-{path.name}")
    (root / "train" / "cat").rmdir()
    (root / "train" / "dog").rmdir()
    with pytest.raises(ValueError, match="train: no class folders"):
        scan_folder(root)


def test_an_empty_class(root):
    for path in (root / "train" / "dog").iterdir():
        path.unlink()
    (root / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"train: no images of class.* 'bird', 'dog', .*bird is empty; add"):
        scan_folder(root)
    (root / "train" / "bird").rmdir()
    (root / "train" / "dog" / "a.heic").touch()
    with pytest.raises(ValueError, match=r"class.* 'dog', .*dog holds only '.heic'"):
        scan_folder(root)


def test_a_folder_of_hidden_images_is_said_to_be_one(root):
    (root / "train" / "__MACOSX").mkdir()
    (root / "train" / "__MACOSX" / "._a.jpg").touch()
    with pytest.raises(
        ValueError, match=r"'__MACOSX', .* holds only 'hidden files'; add images .*or remove the folder"
    ):
        scan_folder(root)


def test_classes_may_lack_evaluation_images_but_not_all_of_them(root):
    for path in (root / "val" / "dog").iterdir():
        path.unlink()
    assert scan_folder(root).val.labels == [0, 0]
    (root / "val" / "dog").rmdir()
    assert scan_folder(root).val.labels == [0, 0]
    for path in (root / "val" / "cat").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"val: no images, .*val is empty"):
        scan_folder(root)


def test_evaluation_images_of_other_classes_are_refused(root):
    (root / "val" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"val: class\(es\) 'bird' are not in .*train"):
        scan_folder(root)


def test_links_that_leave_the_root_are_refused(root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").touch()
    link = root / "train" / "cat" / "link.png"
    link.symlink_to(outside / "secret.png")
    with pytest.raises(ValueError, match=r"link.png: a link to .*secret.png, outside"):
        scan_folder(root)
    link.unlink()
    (root / "train" / "dog").rename(root / "gone")
    (root / "train" / "dog").symlink_to(outside)
    with pytest.raises(ValueError, match=r"dog: a link to .*outside"):
        scan_folder(root)


def test_links_inside_the_root_are_followed_to_files_only(root):
    (root / "train" / "cat" / "copy.png").symlink_to(root / "train" / "dog" / "b.png")
    assert len(scan_folder(root).train.paths) == 5
    (root / "train" / "cat" / "loop").symlink_to(root / "train")
    with pytest.raises(ValueError, match="could loop"):
        scan_folder(root)


def test_the_root_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert len(scan_folder(tmp_path / "link").train.paths) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_no_image(tmp_path):
    """Reading it would wait for ever."""
    (tmp_path / "a.png").touch()
    assert len(image_files(tmp_path, tmp_path.resolve())) == 1
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: a pipe, socket or device, and no image"):
        image_files(tmp_path, tmp_path.resolve())
