import subprocess

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffkd.data.images import read_rgb, upright_size

RAMP = np.arange(0, 256, dtype=np.uint8).reshape(8, 32)


def stored(folder, image, name="image.png", **options):
    path = folder / name
    image.save(path, **options)
    return path


def pixels(path):
    image = read_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_png_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)).convert(mode)
    assert np.array_equal(pixels(stored(tmp_path, image)), np.asarray(image.convert("RGB")))


def test_grey_is_repeated(tmp_path):
    assert np.array_equal(pixels(stored(tmp_path, Image.fromarray(RAMP))), np.repeat(RAMP[..., None], 3, axis=2))


@pytest.mark.parametrize("name", ["image.png", "image.tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    wide = RAMP.astype(np.uint16) * 257
    assert np.array_equal(pixels(stored(tmp_path, Image.fromarray(wide), name))[..., 0], RAMP)


def test_integers_beyond_sixteen_bits_and_floats_are_refused(tmp_path):
    for values, message in ((RAMP.astype(np.int32) * 70000, "pixels reach"), (RAMP.astype(np.float32), "floats")):
        with pytest.raises(ValueError, match=message):
            read_rgb(stored(tmp_path, Image.fromarray(values), "image.tiff"))


def test_cmyk_is_converted(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink: red
    red, green, blue = pixels(stored(tmp_path, image, "image.jpg"))[8, 8]
    assert red > 200
    assert max(green, blue) < 60


def test_a_palette_with_transparency_is_converted_without_a_warning(tmp_path):
    image = Image.fromarray(RAMP).convert("P")
    path = stored(tmp_path, image, transparency=bytes(range(256)))
    assert np.array_equal(pixels(path)[..., 0], np.asarray(image.convert("RGB"))[..., 0])


def test_the_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 8, 20))  # left edge, which becomes the top one
    shown = pixels(stored(tmp_path, image, "image.jpg", exif=exif))
    assert shown.shape == (40, 20, 3)
    assert shown[:6].min() > 200
    assert shown[12:].max() < 60


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_the_head_tells_the_size_of_the_upright_picture(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = stored(tmp_path, Image.new("RGB", (20, 10)), name, exif=exif)
    assert upright_size(path) == pixels(path).shape[:2]


@pytest.mark.parametrize("key", ["exif", "Raw profile type exif", "XML:com.adobe.xmp"])
def test_the_orientation_of_a_png_is_found_wherever_it_is_written(tmp_path, key):
    exif, texts = Image.Exif(), PngInfo()
    exif[0x0112] = 6
    if key == "Raw profile type exif":
        content = exif.tobytes()
        texts.add_text(key, f"\nexif\n{len(content):8}\n{content.hex()}\n")
    elif key == "XML:com.adobe.xmp":
        texts.add_itxt(key, '<rdf:Description tiff:Orientation="6"/>')
    options = {"exif": exif} if key == "exif" else {"pnginfo": texts}
    path = stored(tmp_path, Image.new("RGB", (20, 10)), **options)
    assert upright_size(path) == pixels(path).shape[:2] == (20, 10)


@pytest.mark.parametrize("name", ["image.png", "image.webp", "image.jpg"])
@pytest.mark.parametrize("exif", [b"garbage, and no EXIF", b"Exif\0\0nor is this"])
def test_damaged_exif_is_passed_over(tmp_path, name, exif):
    image = Image.fromarray(np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1))
    path = stored(tmp_path, image, name, exif=exif)
    assert upright_size(path) == (8, 32)
    assert np.array_equal(pixels(path), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("keep", [0, 4, 60, 200])
@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.webp", "image.gif", "image.tiff"])
def test_truncated_files_are_named_with_the_mend(tmp_path, name, keep):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = stored(tmp_path, Image.fromarray(noise), name)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*on_bad_image") as error:
        read_rgb(path)
    assert str(path) in str(error.value)


def test_text_and_missing_files_are_errors_too(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    for name in ("page.jpg", "none.jpg"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read"):
            read_rgb(tmp_path / name)


@pytest.mark.parametrize("limit", [100, 1500])  # more than twice the limit, and a little more than the limit
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    path = stored(tmp_path, Image.new("RGB", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for read in (read_rgb, upright_size):
        with pytest.raises(ValueError, match=r"cannot be read.*(exceed|bomb)"):
            read(path)


@pytest.mark.parametrize("kind", ["text", "international text", "profile", "many texts", "behind the pixels"])
def test_large_texts_of_a_png_are_passed_over(tmp_path, kind):
    image, text = Image.fromarray(RAMP), PngInfo()
    large = "prompt " * 300_000
    options = {"icc_profile": bytes(3_000_000)} if kind == "profile" else {"pnginfo": text}
    if kind == "international text":
        text.add_itxt("parameters", large, zip=True)
    elif kind == "many texts":
        for index in range(70):
            text.add_text(f"parameters {index}", "a" * 1_000_000, zip=True)
    else:
        text.add_text("parameters", large, zip=True)
    path = stored(tmp_path, image, exif=turned(), **options)
    if kind == "behind the pixels":
        content = path.read_bytes()
        start = content.index(b"zTXt") - 4
        end = start + 12 + int.from_bytes(content[start : start + 4])
        path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    assert upright_size(path) == (32, 8)
    assert np.array_equal(pixels(path)[..., 0], np.rot90(RAMP, -1))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_programs_that_draw_are_not_run(tmp_path, monkeypatch):
    """Pillow would start an interpreter of PostScript, whatever the name of the file."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **options: started.append(args))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    path = tmp_path / "picture.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_rgb, upright_size):
        with pytest.raises(ValueError, match=r"picture\.jpg cannot be read .*a program that draws, which is not run"):
            read(path)
    assert started == []
