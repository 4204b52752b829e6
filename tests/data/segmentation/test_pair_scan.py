from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffkd.data.segmentation.pairs import scan_pairs


def image(path, size=(6, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)
    return path


def mask(path, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros(size[::-1], dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    for name in ("b", "a", "deep/er/c"):
        image(tmp_path / "root" / "images" / f"{name}.jpg")
        mask(tmp_path / "root" / "masks" / f"{name}.png")
    return tmp_path / "root"


def test_pairs_match_at_any_depth(root):
    image(root / "images" / "x.y.JPEG", (3, 5))
    mask(root / "masks" / "x.y.png", (3, 5))
    (root / "images" / "notes.txt").touch()
    images, masks, sizes = scan_pairs(root, "images", "masks")
    for paths, folder in ((images, "images"), (masks, "masks")):
        names = [Path(path).relative_to(root / folder).with_suffix("").as_posix() for path in paths]
        assert names == ["a", "b", "deep/er/c", "x.y"]
    assert sizes == [(4, 6)] * 3 + [(5, 3)]


@pytest.mark.parametrize(("image_suffix", "mask_suffix"), [("_rgb", "_mask"), ("_rgb.webp", "_mask.png")])
def test_suffixes_choose_the_files(root, image_suffix, mask_suffix):
    image(root / "images" / "deep" / "1_rgb.webp")
    mask(root / "masks" / "deep" / "1_mask.png")
    mask(root / "masks" / "deep" / "1_color.png")
    images, masks, _ = scan_pairs(root, "images", "masks", image_suffix=image_suffix, mask_suffix=mask_suffix)
    assert images == [str(root / "images" / "deep" / "1_rgb.webp")]
    assert masks == [str(root / "masks" / "deep" / "1_mask.png")]


def test_images_and_masks_may_share_a_folder(root):
    image(root / "all" / "1.jpg")
    mask(root / "all" / "1_mask.png")
    images, masks, _ = scan_pairs(root, "all", "all", image_suffix=".jpg", mask_suffix="_mask.png")
    assert [Path(path).name for path in images + masks] == ["1.jpg", "1_mask.png"]


def test_lonely_files_are_named(root):
    (root / "masks" / "a.png").unlink()
    (root / "images" / "deep" / "er" / "c.jpg").unlink()
    with pytest.raises(ValueError, match=r"2 file\(s\)") as error:
        scan_pairs(root, "images", "masks")
    assert f"image {root}/images/a.jpg has no mask {root}/masks/a.png" in str(error.value)
    assert f"mask {root}/masks/deep/er/c.png has no image" in str(error.value)


def test_at_most_ten_problems_are_spelled_out(root):
    for index in range(12):
        image(root / "images" / f"{index:02}.jpg")
    with pytest.raises(ValueError, match=r"12 file\(s\)[\s\S]*09.jpg[\s\S]*and 2 more$") as error:
        scan_pairs(root, "images", "masks")
    assert "10.jpg" not in str(error.value)


def test_two_files_of_one_name_are_ambiguous(root):
    image(root / "images" / "a.webp")
    with pytest.raises(ValueError, match=r"a.jpg and .*a.webp are both the image 'a'.*image_suffix to '.webp'"):
        scan_pairs(root, "images", "masks")
    assert len(scan_pairs(root, "images", "masks", image_suffix=".jpg").images) == 3


def test_sizes_must_agree(root):
    mask(root / "masks" / "a.png", (4, 6))
    with pytest.raises(ValueError, match=r"a.jpg is 6x4 pixels but its mask .*a.png is 4x6; give both the same size"):
        scan_pairs(root, "images", "masks")


def test_a_turned_image_says_so(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    image(root / "images" / "a.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"a.jpg is 4x6 pixels but .*a.png is 6x4: .*EXIF orientation; turn the mask"):
        scan_pairs(root, "images", "masks")
    mask(root / "masks" / "a.png", (4, 6))
    assert scan_pairs(root, "images", "masks").sizes[0] == (6, 4)


def test_a_jpeg_mask_is_refused(root):
    (root / "masks" / "a.png").unlink()
    image(root / "masks" / "a.jpg")
    with pytest.raises(ValueError, match=r"masks/a.jpg is a JPEG file, whose compression changes ids"):
        scan_pairs(root, "images", "masks")


def test_a_reason_that_many_files_share_is_said_once(root):
    for path in root.glob("masks/**/*.png"):
        Image.new("RGB", (6, 4)).save(path)
    mask(root / "masks" / "a.png", (4, 6))
    with pytest.raises(ValueError, match=r"3 pair\(s\)") as error:
        scan_pairs(root, "images", "masks")
    first, second = str(error.value).splitlines()[1:]
    assert "a.png is 4x6" in first
    assert f"mask {root}/masks/b.png holds pixels of mode RGB" in second
    assert second.endswith(f"with a palette. Likewise '{root}/masks/deep/er/c.png'.")


def test_empty_files_are_named(root):
    (root / "images" / "a.jpg").write_bytes(b"")
    (root / "masks" / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 pair\(s\)[\s\S]*images/a.jpg cannot be read[\s\S]*masks/b.png cannot be"):
        scan_pairs(root, "images", "masks")


def test_empty_and_missing_folders(root):
    (root / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: no image; add images"):
        scan_pairs(root, "none", "masks")
    with pytest.raises(ValueError, match=r"masks: no mask whose name ends in '_x'"):
        scan_pairs(root, "images", "masks", mask_suffix="_x")
    with pytest.raises(FileNotFoundError, match=r"labels: no such folder of masks.*'images', 'masks'"):
        scan_pairs(root, "images", "labels")


def test_links_that_leave_the_root_are_refused(root, tmp_path):
    outside = mask(tmp_path / "outside" / "d.png")
    (root / "masks" / "d.png").symlink_to(outside)
    with pytest.raises(ValueError, match=r"d.png: a link to .*outside"):
        scan_pairs(root, "images", "masks")
    (root / "linked").symlink_to(outside.parent)
    with pytest.raises(ValueError, match=r"linked: leads to .*outside of"):
        scan_pairs(root, "images", "linked")
    with pytest.raises(ValueError, match="outside of"):
        scan_pairs(root, "images", "../outside")
