import inspect
import warnings

import numpy as np
import pytest
from PIL import Image

from diffkd.data import VocSegmentation, palette
from diffkd.files.config import describe

IDS = np.array([[0, 1, 20], [255, 15, 15]], dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    top = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (top / folder).mkdir(parents=True)
    for name in ("2007_000001", "2007_000002", "2007_000003", "2008_unlisted"):
        Image.new("RGB", (3, 2)).save(top / "JPEGImages" / f"{name}.jpg")
        if name != "2008_unlisted":
            image = Image.frombytes("P", (3, 2), IDS.tobytes())
            image.putpalette(palette(256).flatten().tolist())
            image.save(top / "SegmentationClass" / f"{name}.png")
            Image.fromarray(IDS[:, ::-1]).save(top / "SegmentationClassAug" / f"{name}.png")
    lists = {"train": "2007_000003\n2007_000001\n", "val": "2007_000002\n\n"}
    for name, content in lists.items():
        (top / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(content)
    return top


@pytest.mark.parametrize("up", [0, 1, 2])
def test_lists_choose_the_pairs_and_palettes_are_ids(root, up):
    data = VocSegmentation((root, *root.parents)[up], num_workers=0, crop_size=(4, 5))
    assert data.num_classes == len(data.classes) == 21
    assert (data.classes[0], data.classes[1], data.classes[-1]) == ("background", "aeroplane", "tv/monitor")
    ((images, masks, _),) = data.val_dataloader()
    assert images.shape == (1, 3, 2, 3)
    assert masks[0].tolist() == IDS.tolist()
    assert next(iter(data.train_dataloader()))[0].shape == (2, 3, 4, 5)
    assert all(hasattr(data, name) for name in inspect.signature(VocSegmentation).parameters)


def test_other_masks_and_lists_can_be_chosen(root):
    data = VocSegmentation(root, num_workers=0, val="train", masks="SegmentationClassAug")
    masks = [batch[1][0].tolist() for batch in data.val_dataloader()]
    assert masks == [IDS[:, ::-1].tolist()] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "2007_000002\n2008_unlisted\n2009\n",
            r"3 of the files it names are missing[\s\S]*SegmentationClass/2008_unlis",
        ),
        ("../../../outside\n", "outside of"),
        ("/etc/hostname\n", "outside of"),
        ("\n", "lists no images"),
        ("2007_é\n", "no text in UTF-8 .*; save it as UTF-8"),
        ("2007_000002\n2007_000001\n2007_000002\n", "'2007_000002' is listed twice"),
    ],
)
def test_bad_lists_are_refused(root, content, message):
    path = root / "ImageSets" / "Segmentation" / "val.txt"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        VocSegmentation(root)
    assert str(path) in str(error.value)


def test_a_missing_list_is_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_aug.txt: no such list"):
        VocSegmentation(root, train="train_aug")
    with pytest.raises(FileNotFoundError, match=r"no such list"):
        VocSegmentation(tmp_path / "elsewhere")


def small_ids(root, high):
    for path in (root / "SegmentationClass").iterdir():
        Image.fromarray((np.arange(6) % high).reshape(2, 3).astype(np.uint8)).save(path)


@pytest.mark.parametrize("given", ["names", "file"])
def test_own_classes(root, given):
    small_ids(root, 3)
    names = ("background", "cell", "crack")
    (root / "classes.txt").write_text("\n".join(names))
    data = VocSegmentation(root, num_workers=0, classes=list(names) if given == "names" else "classes.txt")
    assert (data.classes, data.num_classes) == (names, 3)
    record = describe(data)["init_args"]
    assert record["classes"] == (list(names) if given == "names" else "classes.txt")


def test_masks_of_own_classes_are_suspected(root):
    small_ids(root, 3)
    with pytest.warns(UserWarning, match=r"ids 0 to 2 only, .*aeroplane.*classes=\.\.\., or use MaskFolder"):
        assert describe(VocSegmentation(root))["init_args"]["classes"] is None


LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ndog:51,221,255:head,tail:walk\ncat:250,50,83::\n"


def in_colors(root):
    """Write masks of background, dog, border, cat and of two more pixels of background."""
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0, 1], pixels[0, 2], pixels[1, 0] = (51, 221, 255), (224, 224, 192), (250, 50, 83)
    for path in (root / "SegmentationClass").iterdir():
        Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("border", ["", "ignored:224,224,192::\n"])
def test_masks_in_colours_are_read_by_their_labelmap(root, border):
    in_colors(root)
    (root / "labelmap.txt").write_text(LABELMAP + border)
    data = VocSegmentation(root, num_workers=0, crop_size=(4, 5))
    assert data.classes == ("background", "dog", "cat")
    assert next(iter(data.val_dataloader()))[1][0].tolist() == [[0, 1, 255], [2, 0, 0]]
    own = VocSegmentation(root, num_workers=0, classes=["background", "cat"])
    assert next(iter(own.val_dataloader()))[1][0].tolist() == [[0, 255, 255], [1, 0, 0]]


def test_masks_in_colours_without_a_labelmap_are_refused_with_the_mend(root):
    in_colors(root)
    with pytest.raises(ValueError, match=r"pixels of mode RGB .*VocSegmentation: labelmap\.txt in the root"):
        VocSegmentation(root)
    (root / "labelmap.txt").write_text("background:0,0,0::\ndog:51,221,255::\n")
    with pytest.raises(ValueError, match=r"colour \(250, 50, 83\) .*; add it to colors or labelmap\.txt"):
        VocSegmentation(root, verify=True)


def test_a_labelmap_beside_masks_of_ids_is_not_needed(root):
    (root / "labelmap.txt").write_text(LABELMAP)
    assert VocSegmentation(root, num_workers=0).num_classes == 21


@pytest.mark.parametrize(
    "lines", ["\ufeff2007_000003\n2007_000001.jpg\n", "/JPEGImages/{0}.jpg /SegmentationClass/{0}.png\n"]
)
def test_lists_as_others_write_them(root, lines):
    (root / "ImageSets/Segmentation/train.txt").write_text(lines.format("2007_000001"), encoding="utf-8")
    data = VocSegmentation(root, num_workers=0, batch_size=1)
    assert data.train_dataloader().sampler.size == lines.count("\n")


@pytest.mark.parametrize(("image", "mask"), [("png", "png"), ("JPG", "PNG"), ("jpeg", "bmp")])
def test_images_and_masks_of_other_extensions(root, image, mask):
    for folder, extension in (("JPEGImages", image), ("SegmentationClass", mask)):
        for path in (root / folder).iterdir():
            with Image.open(path) as stored:
                stored.copy().save(
                    path.with_suffix(f".{extension}"), format={"JPG": "JPEG", "PNG": "PNG"}.get(extension)
                )
            if path.suffix != f".{extension}":
                path.unlink()
    assert VocSegmentation(root, num_workers=0).train_dataloader().sampler.size == 2


@pytest.mark.parametrize("line", ["../../../outside", "/etc/hostname", "/../x/a.jpg /SegmentationClass/../../../b.png"])
def test_followed_links_are_no_way_out_for_names(root, line):
    (root / "ImageSets/Segmentation/val.txt").write_text(line)
    with pytest.raises(ValueError, match="outside of"):
        VocSegmentation(root, follow_links=True)


def test_broken_and_missing_pairs_can_be_left_out(root):
    names = root / "ImageSets" / "Segmentation" / "train.txt"
    names.write_text(f"{names.read_text()}2008_unlisted\n2009_missing\n2007_000002\n")
    (root / "JPEGImages" / "2007_000001.jpg").write_bytes(b"broken")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = VocSegmentation(root, num_workers=0, crop_size=(4, 5), batch_size=1, on_bad_image="skip")
    assert data.train_dataloader().sampler.size == 2
    assert any("3 of 5 training pairs are left out" in str(one.message) for one in said)
    assert len(data.skipped) == 3
