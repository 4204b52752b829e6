import json

import pytest

from diffkd.data.segmentation.mask_folder import class_colors, class_names

COLORS = {"sky": (128, 128, 128), "road works": (0, 4, 255)}


def test_names_come_from_code_or_from_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("﻿sky\r\nroad works \r\n\r\n", encoding="utf-8")
    for given in (["sky", "road works"], "names.txt", tmp_path / "names.txt"):
        assert class_names(given, tmp_path) == ("sky", "road works")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no classes"),
        ("a\n\nb\n", "class 1 is empty"),
        ("a\nb\na", "'a' is listed twice, as 0 and 2"),
        ("\n".join(map(str, range(1_000_000))), "1,000,000 classes, but masks have ids of 16 bits"),
    ],
)
def test_names_that_cannot_be_told_apart(tmp_path, content, message):
    for name in ("names.txt", "names.csv"):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            class_names(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("_classes.csv", "Pixel Value, Class\n0, sky\n"), ("names.json", '["sky",\n"tree"]'), ("data.yaml", "names:")],
)
def test_tables_are_not_taken_for_names(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: no plain list, it begins with '.*one name a line"):
        class_names(name, tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"classes: no file names.txt"):
        class_names("names.txt", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "name,r,g,b\nsky,128,128,128\nroad works, 0, 4, 255\n",
        "sky 128 128 128\nroad works 0 4 255",
        "128 128 128\t\tsky\n0 4 255\t\troad works",
        "# label:color_rgb:parts:actions\n\nsky:128,128,128::\nroad works:0,4,255::\n",
        "sky:128,128,128:sun,moon:rise 1 2 3\nroad works:0,4,255:lane:\n",
        json.dumps(COLORS),
    ],
)
def test_every_kind_of_file_says_the_same(tmp_path, content):
    path = tmp_path / ("colors.json" if content.startswith("{") else "colors.csv")
    path.write_text(content)
    assert list(class_colors(path.name, tmp_path).items()) == list(COLORS.items())
    assert class_colors({name: list(color) for name, color in COLORS.items()}, tmp_path) == COLORS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "sky,1,2,3\nroad,1,2", r"a.csv, line 2: 'road,1,2' is not a name and a colour"),
        ("a.csv", "sky,1,2,300", r"colour of 'sky' is \[1, 2, 300\]"),
        ("a.csv", "sky,1,2,3\nsky,1,2,4", "'sky' is listed twice"),
        ("a.csv", "name,r,g,b", "no colours"),
        ("a.json", "[1, 2]", "holds no mapping"),
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"sky": [1, 2]}', "colour of 'sky'"),
        ("a.json", '{"sky": [1, 2, 0.5]}', "colour of 'sky'"),
        ("a.json", '{"sky": "red"}', "colour of 'sky' is 'red'"),
    ],
)
def test_what_is_no_table_of_colours_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        class_colors(name, tmp_path)


def test_files_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a.txt: no text in UTF-8 .*; save it as UTF-8"):
        class_colors("a.txt", tmp_path)
