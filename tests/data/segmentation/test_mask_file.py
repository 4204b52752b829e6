import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffkd.data.segmentation.masks import image_header, mask_header, read_image, read_mask

RAMP = np.arange(0, 256, dtype=np.uint8).reshape(8, 32)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(path, rows, *, width, bits=8, interlaced=False):
    """Write a grey PNG from its lines of packed bytes, each with the filter 0 in front."""
    head = struct.pack(">IIBBBBB", width, len(rows), bits, 0, 0, 0, interlaced)
    lines = b"".join(b"\0" + bytes(row) for row in rows)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(content)
    return path


def stored(folder, image, name="mask.png", **options):
    image.save(folder / name, **options)
    return folder / name


def test_eight_bits_are_as_stored(tmp_path):
    ids = read_mask(stored(tmp_path, Image.fromarray(RAMP)))
    assert ids.dtype == np.uint8
    assert np.array_equal(ids, RAMP)


def test_sixteen_bits_are_as_stored(tmp_path):
    wide = RAMP.astype(np.uint16) * 257
    ids = read_mask(stored(tmp_path, Image.fromarray(wide)))
    assert ids.dtype == np.uint16
    assert np.array_equal(ids, wide)


def test_one_bit_is_zero_or_one(tmp_path):
    ids = read_mask(stored(tmp_path, Image.fromarray(RAMP > 100)))
    assert np.array_equal(ids, (RAMP > 100).astype(np.uint8))


@pytest.mark.parametrize(
    ("bits", "rows", "expected"),
    [(2, [[0b00011011], [0b11000000]], [[0, 1, 2, 3], [3, 0, 0, 0]]), (4, [[0x0F, 0x72]], [[0, 15, 7, 2]])],
)
def test_few_bits_of_grey_are_not_spread_over_the_greys(tmp_path, bits, rows, expected):
    assert read_mask(png(tmp_path / "mask.png", rows, width=4, bits=bits)).tolist() == expected


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_index_into_a_palette_is_the_id(tmp_path, bits):
    ids = RAMP & np.uint8((1 << bits) - 1)
    image = Image.frombytes("P", (32, 8), ids.tobytes())
    image.putpalette([value for index in range(1 << bits) for value in (255 - index, 7 * index % 256, 3)])
    assert np.array_equal(read_mask(stored(tmp_path, image, bits=bits, transparency=0)), ids)
    colours = read_mask(tmp_path / "mask.png", colours=True)
    assert np.array_equal(colours[..., 0], 255 - ids)


def test_interlaced_files_read_right(tmp_path):
    expected = np.arange(64, dtype=np.uint8).reshape(8, 8)
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = [row for top, left, down, right in starts for row in expected[top::down, left::right]]
    path = png(tmp_path / "mask.png", passes, width=8, interlaced=True)
    content = path.read_bytes()
    head = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)  # 8 lines, which are stored as 15
    path.write_bytes(content[:8] + chunk(b"IHDR", head) + content[33:])
    assert np.array_equal(read_mask(path), expected)


def test_colours_are_as_stored_and_transparency_is_dropped(tmp_path):
    colours = np.stack([RAMP, RAMP[::-1], RAMP.T.reshape(RAMP.shape), RAMP], axis=-1)
    path = stored(tmp_path, Image.fromarray(colours))
    assert np.array_equal(read_mask(path, colours=True), colours[..., :3])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_where_ids_are_expected_are_refused(tmp_path, mode):
    path = stored(tmp_path, Image.new(mode, (4, 4)))
    with pytest.raises(ValueError, match=rf"{path} holds pixels of mode {mode} where class ids.*colors="):
        read_mask(path)


def test_sixteen_bit_ids_where_colours_are_expected_are_refused(tmp_path):
    path = stored(tmp_path, Image.fromarray(RAMP.astype(np.uint16)))
    with pytest.raises(ValueError, match="where colours are expected"):
        mask_header(path, colours=True)


@pytest.mark.parametrize(("kind", "name"), [("JPEG", "a.jpg"), ("JPEG", "a.png"), ("BMP", "a.bmp"), ("WEBP", "a.png")])
def test_only_png_will_do_whatever_the_name(tmp_path, kind, name):
    path = stored(tmp_path, Image.fromarray(RAMP).convert("RGB"), name, format=kind)
    with pytest.raises(ValueError, match=rf"{name} is a {kind} file.*save masks as PNG") as error:
        mask_header(path, colours=False)
    assert ("lossy" in str(error.value) or "changes ids" in str(error.value)) == (kind != "BMP")


@pytest.mark.parametrize("keep", [0, 4, 60, 200, -12])
def test_truncated_files_are_named(tmp_path, keep):
    noise = np.random.default_rng(0).integers(0, 5, (40, 40), dtype=np.uint8)
    path = stored(tmp_path, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"mask {path} cannot be read"):
        read_mask(path)


def test_a_single_wrong_bit_is_found(tmp_path):
    path = stored(tmp_path, Image.fromarray(RAMP))
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"mask {path} cannot be read"):
        read_mask(path)


def test_a_mask_is_turned_upright_as_an_image_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in (Image.fromarray(RAMP), Image.fromarray(RAMP.astype(np.uint16) * 200)):
        path = stored(tmp_path, image, exif=exif)
        assert mask_header(path, colours=False) == ((32, 8), (8, 32))
        assert np.array_equal(read_mask(path), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.png", "a.tif"])
def test_the_head_tells_the_upright_size(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = stored(tmp_path, Image.new("RGB", (20, 10)), name, exif=exif)
    assert image_header(path).size == read_image(path).shape[:2]
    assert image_header(path).stored == (10, 20)


def test_broken_images_are_named_without_options_of_other_data(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>")
    for read in (image_header, read_image):
        with pytest.raises(ValueError, match=r"image .*a.jpg cannot be read .*remove it and its mask") as error:
            read(tmp_path / "a.jpg")
        assert "on_bad_image" not in str(error.value)


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P", "RGBA", "I;16"])
def test_images_of_every_kind_become_rgb(tmp_path, mode):
    image = Image.new("L", (6, 4), 255).convert("L")
    image = Image.fromarray(np.full((4, 6), 65535, np.uint16)) if mode == "I;16" else image.convert(mode)
    pixels = read_image(stored(tmp_path, image, "a.tif"))
    assert pixels.shape == (4, 6, 3)
    assert pixels.min() == 255


def test_a_decompression_bomb_is_refused_by_its_head(tmp_path, monkeypatch):
    path = stored(tmp_path, Image.new("L", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.raises(ValueError, match="exceed"):
        image_header(path)
    with pytest.raises(ValueError, match="exceed"):
        mask_header(path, colours=False)


@pytest.mark.parametrize("palette", [None, "colours"])
@pytest.mark.parametrize("kind", ["bmp", "tif", "gif", "pgm"])
def test_other_files_without_loss_hold_ids_too(tmp_path, kind, palette):
    ids = np.array([[0, 1, 200], [3, 255, 0]], dtype=np.uint8)
    image = Image.fromarray(ids)
    if palette == "colours":
        ids = np.array([[0, 1, 2], [3, 4, 0]], dtype=np.uint8)
        image = Image.fromarray(ids)
        image.putpalette([10, 200, 30, 7, 7, 9, 1, 2, 3, 4, 4, 8, 9, 9, 1])
    if kind == "pgm" and palette:
        return
    image.save(tmp_path / f"mask.{kind}", **({"format": "PPM"} if kind == "pgm" else {}))
    assert np.array_equal(read_mask(tmp_path / f"mask.{kind}"), ids)


@pytest.mark.parametrize("kind", ["tif", "pgm"])
def test_sixteen_bits_of_other_files(tmp_path, kind):
    ids = np.array([[0, 1, 60000], [3, 255, 0]], dtype=np.uint16)
    Image.fromarray(ids).save(tmp_path / f"mask.{kind}", **({"format": "PPM"} if kind == "pgm" else {}))
    assert np.array_equal(read_mask(tmp_path / f"mask.{kind}"), ids)


def test_a_lossy_tiff_is_refused(tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "mask.tif", compression="jpeg")
    with pytest.raises(ValueError, match=r"mask.tif is a TIFF file, whose compression changes ids; save masks as PNG"):
        read_mask(tmp_path / "mask.tif")
