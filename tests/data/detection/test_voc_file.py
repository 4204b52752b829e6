import warnings

import pytest
from PIL import Image

from diffkd.data import VocDetection
from diffkd.data.detection.voc import find_voc_split, read_voc

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""
SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


def one(name, *box, difficult=0):
    return OBJECT.format(name=name, box=box, difficult=difficult)


def text(*objects, filename="", size=SIZE):
    return f"<annotation><filename>{filename}</filename>{size}{''.join(objects)}</annotation>"


@pytest.fixture
def root(tmp_path):
    """Make the official folders: image a with two objects, b with none, c with one."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a.jpg", "b.png", "c.JPG"):
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / name)
    boxes = [one("dog", 1, 2.5, 10, 20), one("cat", 30, 5, 45, 30, difficult=1)]
    (tmp_path / "Annotations/a.xml").write_text(text(*boxes, filename="a.jpg"))
    (tmp_path / "Annotations/b.xml").write_text(text(filename="renamed.jpg"))
    (tmp_path / "Annotations/c.xml").write_text(text(one("dog", 3, 3, 3, 9), size=""))
    (tmp_path / "ImageSets/Main/train.txt").write_text("a  1\nb -1\n\nc\n")
    return tmp_path


def read(root, split="train", **options):
    return read_voc(find_voc_split(root, split), **options)


@pytest.mark.parametrize(("said", "crowd"), [("False", 0), (" 0 ", 0), ("", 0), ("true", 1), ("1", 1)])
def test_difficult_objects(root, said, crowd):
    (root / "Annotations/c.xml").write_text(text(one("dog", 3, 3, 8, 9, difficult=said)))
    assert read(root).annotations.of(2).iscrowd.tolist() == [crowd]


def test_other_words_for_difficult_are_refused(root):
    (root / "Annotations/c.xml").write_text(text(one("dog", 3, 3, 8, 9, difficult="hard")))
    with pytest.raises(ValueError, match=r"c\.xml: object .* has difficult 'hard'; write 0 or 1"):
        read(root)


def test_what_is_in_the_official_folders(root):
    files = read(root)
    assert (files.classes, files.category_ids) == (("cat", "dog"), (1, 2))
    assert files.paths == tuple(str(root / "JPEGImages" / name) for name in ("a.jpg", "b.png", "c.JPG"))
    assert files.sizes.tolist() == [[30, 40]] * 3
    boxes = files.annotations.of(0)
    assert boxes.boxes.tolist() == [[1, 2.5, 10, 20], [30, 5, 40, 30]]
    assert boxes.labels.tolist() == [2, 1]
    assert boxes.iscrowd.tolist() == [0, 1]
    assert boxes.area.tolist() == [9 * 17.5, 250]
    assert len(files.annotations.of(1).labels) == len(files.annotations.of(2).labels) == 0
    assert len(files.dropped) == 1
    assert "c.JPG" in files.dropped[0]


def test_an_image_is_found_whatever_the_case_of_its_extension(root):
    (root / "JPEGImages/b.png").unlink()
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/b.WEBP")
    assert read(root).paths[1] == str(root / "JPEGImages/b.WEBP")


def test_official_corners_count_from_one(root):
    files = read(root, first_pixel=1)
    assert files.annotations.of(0).boxes.tolist() == [[0, 1.5, 10, 20], [29, 4, 40, 30]]
    assert files.annotations.of(2).boxes.tolist() == [[2, 2, 3, 9]]
    with pytest.raises(ValueError, match="first_pixel=2"):
        read(root, first_pixel=2)


def test_a_folder_of_files_side_by_side(tmp_path):
    (tmp_path / "valid").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "valid/x y.jpg")
    (tmp_path / "valid/x y.xml").write_text(text(one("dog", 1, 2, 3, 4), filename="x y.jpg"))
    files = read(tmp_path, "valid", classes=["cat", "dog"])
    assert files.paths == (str(tmp_path / "valid/x y.jpg"),)
    assert files.annotations.of(0).labels.tolist() == [2]


def test_hidden_files_beside_the_annotations_are_passed_over(tmp_path):
    (tmp_path / "valid").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "valid/a.jpg")
    (tmp_path / "valid/a.xml").write_text(text(one("dog", 1, 2, 3, 4)))
    for name in ("._a.xml", "._a.jpg"):  # as macOS writes them into archives
        (tmp_path / "valid" / name).write_bytes(b"\x00\x05\x16\x07")
    assert read(tmp_path, "valid").paths == (str(tmp_path / "valid/a.jpg"),)


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]>' + text(one("&c;", 1, 2, 3, 4))
FETCH = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>' + text(one("&b;", 1, 2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "no XML"),
        (b"", "no XML"),
        (b"\xff\xd8\xff", "no XML"),
        ("<html/>", "its root is 'html', not 'annotation'"),
        (text(one("dog", 1, 2, 3, 4)).replace("<annotation", "<annotation xmlns='http://x'"), "{http://x}annotation"),
        (BOMB, "document type"),
        (BOMB.encode("utf-16"), "document type"),
        (FETCH, "document type"),
        (text(one("cow", 1, 2, 3, 4)), "object 0 is of class 'cow', which is none of 'cat', 'dog'"),
        (text(one("dog", 1, 2, "x", 4)), "has 'x' where a number"),
        (text(one("dog", 1, "", 3, 4)), "lacks 'bndbox/ymin'"),
        (text("<object><name>dog</name></object>"), "object 0 lacks 'bndbox/xmin'"),
        (text(one("", 1, 2, 3, 4)), "object 0 lacks 'name'"),
        (text(filename="../../a.jpg"), "'../../a.jpg' is no file inside"),
        (text(filename="/etc/passwd"), "'/etc/passwd' is no file inside"),
        (text(size=SIZE.replace("30", "-3")), "its size is 40x-3"),
    ],
)
def test_bad_files_are_refused_by_name(root, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (root / "Annotations/b.xml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(root, classes=["cat", "dog"])
    assert "b.xml" in str(caught.value)


@pytest.mark.parametrize("stated", ["C:\\me\\a.jpg", "..\\pictures\\a.jpg", "C:\\me\\gone.jpg"])
def test_the_folder_of_whoever_labelled_on_windows_is_passed_over(root, stated):
    (root / "Annotations/a.xml").write_text(text(one("dog", 1, 2, 3, 4), filename=stated))
    assert read(root, classes=["cat", "dog"]).paths[0] == str(root / "JPEGImages/a.jpg")


def test_the_image_called_like_the_xml_file_goes_before_the_one_it_names(root):
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/a.png")
    for name, stated in (("a", "b.png"), ("b", "c.JPG"), ("c", "a.jpg")):
        (root / f"Annotations/{name}.xml").write_text(text(one("dog", 1, 2, 9, 9), filename=stated))
    with pytest.warns(UserWarning, match=r"3 XML file\(s\) have the <filename> of another .*a\.xml names 'b\.png'"):
        files = read(root)
    assert files.paths == tuple(str(root / "JPEGImages" / name) for name in ("a.jpg", "b.png", "c.JPG"))


@pytest.mark.parametrize("stated", ["photo.png", "a.png", "night/a.png"])
def test_the_named_image_is_taken_where_it_is_the_only_one_or_called_alike(root, stated):
    if stated == "photo.png":
        (root / "JPEGImages/a.jpg").unlink()
    (root / "JPEGImages/night").mkdir()
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / stated)
    (root / "Annotations/a.xml").write_text(text(one("dog", 1, 2, 9, 9), filename=stated))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(root).paths[0] == str(root / "JPEGImages" / stated)


def test_bad_lists_are_refused_by_name(root):
    names = root / "ImageSets/Main/train.txt"
    for content, message in (
        ("a\nb\na\n", "lists 'a' more than once"),
        ("", "no XML files"),
        ("../JPEGImages/a", "is no file inside"),
    ):
        names.write_text(content)
        with pytest.raises(ValueError, match=message):
            read(root)
    names.write_bytes("é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.txt: no text in UTF-8 .*; save it as UTF-8"):
        read(root)
    names.write_text("a\ngone\n")
    with pytest.raises(FileNotFoundError, match=r"gone.xml: no such file"):
        read(root)
    with pytest.raises(FileNotFoundError, match=r"val.txt: no such list"):
        read(root, "val")


def test_classes_must_come_from_somewhere(root):
    (root / "ImageSets/Main/train.txt").write_text("b\n")
    with pytest.raises(ValueError, match="no objects, hence no classes"):
        read(root)


def test_the_folder_of_whoever_labelled_elsewhere_is_passed_over(root):
    (root / "Annotations/a.xml").write_text(text(one("dog", 1, 2, 3, 4), filename="/home/u/pictures/a.jpg"))
    assert read(root, classes=["cat", "dog"]).paths[0] == str(root / "JPEGImages/a.jpg")


@pytest.mark.parametrize("encoding", ["utf8", "UTF-8", "gbk", "shift_jis", "euc-kr", "big5", "utf-16"])
def test_declared_encodings(root, encoding):
    name = {"shift_jis": "犬", "gbk": "狗", "big5": "狗", "euc-kr": "개"}.get(encoding, "chien à poil")
    content = f"<?xml version='1.0' encoding='{encoding}'?>\n" + text(one(name, 1, 2, 3, 4), filename="a.jpg")
    (root / "Annotations/a.xml").write_bytes(content.encode(encoding))
    assert name in read(root).classes


@pytest.mark.parametrize("encoding", ["utf8", "gbk", "rot13", "zlib", "nothing", "utf-16", "punycode"])
def test_a_declared_encoding_brings_no_entities(root, encoding):
    bomb = BOMB.replace("&c;", "&c;" * 3)
    (root / "Annotations/b.xml").write_text(f"<?xml version='1.0' encoding='{encoding}'?>{bomb}")
    with pytest.raises(ValueError, match=r"b.xml: no XML of Pascal VOC"):
        read(root)


def test_lists_may_hold_the_extension_and_a_mark(root):
    (root / "ImageSets/Main/train.txt").write_text("\ufeffa.jpg\nb.png\n", encoding="utf-8")
    assert read(root).paths == tuple(str(root / "JPEGImages" / name) for name in ("a.jpg", "b.png"))


def test_listed_names_may_end_like_a_flag(root):
    for name in ("frame 0", "frame 1"):
        Image.new("RGB", (40, 30)).save(root / f"JPEGImages/{name}.jpg")
        (root / f"Annotations/{name}.xml").write_text(text(one("dog", 1, 2, 9, 9)))
    (root / "ImageSets/Main/train.txt").write_text("frame 0\nframe 1 -1\na 0\n")
    assert read(root).paths == tuple(str(root / f"JPEGImages/{name}.jpg") for name in ("frame 0", "frame 1", "a"))


def test_what_kaggle_has_needs_a_share_for_evaluation(tmp_path):
    for folder in ("annotations", "images"):
        (tmp_path / folder).mkdir()
    for name in "abcd":
        Image.new("RGB", (40, 30)).save(tmp_path / f"images/{name}.png")
        (tmp_path / f"annotations/{name}.xml").write_text(text(one("dog", 1, 2, 9, 9), filename=f"{name}.png"))
    with pytest.raises(FileNotFoundError, match=r"train\.txt: no such list, .*set val_share=0\.1 to train on all"):
        VocDetection(tmp_path)
    data = VocDetection(tmp_path, val_share=0.25, num_workers=0)
    assert [loader.sampler.size for loader in (data.train_dataloader(), data.val_dataloader())] == [3, 1]
    assert read(tmp_path, ".").paths[0] == str(tmp_path / "images/a.png")
    (tmp_path / "annotations").rename(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"image .*train/a\.png is missing"):
        VocDetection(tmp_path, val_share=0.25)


def test_existing_lists_are_named_where_one_is_missing(root):
    with pytest.raises(FileNotFoundError, match="give the name of a split, such as 'train'"):
        VocDetection(root, train="default", val_share=0.5)


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2007", "VOC2012"])
def test_the_archives_are_found_as_they_unpack(root, place):
    top = root / "above" / place
    top.mkdir(parents=True)
    for name in ("Annotations", "JPEGImages", "ImageSets"):
        (root / name).rename(top / name)
    assert read(root / "above").paths[0] == str(top / "JPEGImages/a.jpg")
    (root / "above/VOCdevkit/VOC2012/Annotations").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"above: holds 'VOCdevkit/VOC2012', .*; give one of them as the root"):
        read(root / "above")


def test_bad_files_and_objects_are_left_out(root):
    for name in "de":
        Image.new("RGB", (40, 30)).save(root / f"JPEGImages/{name}.jpg")
    (root / "Annotations/d.xml").write_text("<annotation>")
    (root / "Annotations/e.xml").write_text(text(one("dog", 1, 2, 9, 9), one("dog", 1, "x", 9, 9)))
    (root / "Annotations/a.xml").write_text(text(one("dog", 1, 2, 9, 9), filename="a.jpg"))
    (root / "ImageSets/Main/train.txt").write_text("a\nd\ne\ngone\n")
    (root / "ImageSets/Main/val.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"d.xml: no XML"):
        VocDetection(root)
    with pytest.warns(UserWarning, match="2 of 4 images are left"), pytest.warns(UserWarning, match=r"1 box\(es\)"):
        data = VocDetection(root, on_bad_image="skip", num_workers=0)
    assert data.train_dataloader().sampler.size == 2
    assert [message for message in data.dropped if "e.xml: object 1 has 'x'" in message]
    assert len(data.skipped) == 2


def test_evaluation_images_may_be_called_valid(root):
    (root / "ImageSets/Main/valid.txt").write_text("a\n")
    (root / "Annotations/a.xml").write_text(text(one("dog", 1, 2, 9, 9), filename="a.jpg"))
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    assert VocDetection(root, num_workers=0).val_dataloader().sampler.size == 1
