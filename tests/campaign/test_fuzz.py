"""Files that are valid but for a few changes: readers read them, or raise what they document, with the file's name.

`DIFFKD_EXAMPLES` is the number of files for each reader (500; a fiftieth of it for whole commands).
"""

import copy
import gzip
import io
import json
import pickle
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import yaml
from campaign.hostile import ESCAPE, NAMES
from campaign.runs import count
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from small_nets import ConvNet

from diffkd.commands.arguments import values_of_fit
from diffkd.commands.inspect_file import inspect
from diffkd.data.classification.arrays import read_npz
from diffkd.data.classification.fashion_mnist import read_idx
from diffkd.data.classification.in_memory import check_image_set
from diffkd.data.detection.coco import read_coco
from diffkd.data.detection.voc import find_voc_split, read_voc
from diffkd.data.detection.yolo import read_yolo, read_yolo_facts, read_yolo_layout
from diffkd.data.images import read_orientation, read_rgb, upright_size
from diffkd.data.segmentation.mask_folder import class_colors, class_names
from diffkd.data.segmentation.masks import MaskCode
from diffkd.export.plain_student import rebuild
from diffkd.export.student_file import read_card
from diffkd.files.fitting import load_weights
from diffkd.files.history import read_csv
from diffkd.files.weights import read_contents
from diffkd.models import load_model
from diffkd.recipes.trust import UsageError
from diffkd.training.checkpointing import read_checkpoint

EXAMPLES = count("DIFFKD_EXAMPLES", 500)

# Pieces that mean something in one of the formats.
_TOKENS = [
    *(
        b"\0",
        b"\xff",
        b"\n",
        b"\r\n",
        b"\xef\xbb\xbf",
        b'"',
        b"'",
        b"{",
        b"}",
        b"[",
        b"]",
        b"<",
        b"/>",
        b"&",
        b"*",
        b"&a",
    ),
    *(
        b"nan",
        b"inf",
        b"-1",
        b"1e400",
        b"0x10",
        b"null",
        b"true",
        b"9" * 400,
        b"!!python/name:os.system",
        b"<!DOCTYPE a>",
    ),
    *(b"cos\nsystem\n", b"R", b"(", b".", b"q\0", b"\x93", b"\x85", b"\x81", b"b", b"u", b"s", b"\x8c\x02os"),
    *(struct.pack("<I", 2**31 - 1), struct.pack("<Q", 2**62), struct.pack(">I", 2**32 - 1), ESCAPE.encode()),
]
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "1", "1.0", "a", "a/b", [], {}, [[]], [None], [1, 2, 3, 4], {"a": 1}, [[1, 2, 3]], ["a"], {"": {}}),
    *(value[:1000] for value in NAMES.values()),
]


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Change bytes in a few places: replaced, removed, repeated, cut off, or pieces of formats put in."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 50]))
        kind = draw(st.sampled_from(["byte", "token", "over", "remove", "repeat", "cut"]))
        if kind == "byte":
            content = content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
        elif kind in ("token", "over"):
            token = draw(st.sampled_from(_TOKENS))
            content = content[:place] + token + content[place + (len(token) if kind == "over" else 0) :]
        elif kind == "remove":
            content = content[:place] + content[place + length :]
        elif kind == "repeat":
            content = content[:place] + content[place : place + length] * 3 + content[place + length :]
        else:
            content = content[:place]
    return content


@st.composite
def changed_values(draw: st.DrawFn, content: Any) -> Any:
    """Change values anywhere in nested mappings and lists: replaced, removed, repeated, or under another key."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        if not places:
            break
        owner, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat", "rename"]))
        if kind == "replace":
            owner[key] = copy.deepcopy(draw(st.sampled_from(_VALUES)))  # what is changed next must not be the example's
        elif kind == "remove":
            del owner[key]
        elif kind == "repeat" and isinstance(owner, list):
            owner.append(owner[key])
        elif kind == "rename" and isinstance(owner, dict):
            owner[draw(st.sampled_from(["", "a", ESCAPE, "class_path", "id", "0"]))] = owner.pop(key)
    return content


def _places(content: Any) -> Any:
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(inside):
        yield content, key
        yield from _places(value)


def fuzz(
    folder: Path,
    name: str,
    contents: st.SearchStrategy[bytes],
    read: Callable[[Path], object],
    record: Callable[[str, object], None],
    *,
    examples: int = EXAMPLES,
    allowed: tuple[type[Exception], ...] = (ValueError, FileNotFoundError),
    named: str | None = None,
) -> None:
    """Read changed files; an error must be of the allowed kinds, of one paragraph, and name the file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    tried = {"read": 0, "refused": 0}
    started = time.monotonic()

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(contents)
    def try_one(content: bytes) -> None:
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(path)
                tried["read"] += 1
            except allowed as error:
                tried["refused"] += 1
                problem = _undocumented(error, allowed, named if named is not None else path.name)
                assert not problem, problem

    try_one()
    record(
        "campaign",
        f"| fuzzing: {name} by {read.__name__.strip('_')} | {sum(tried.values())} files | {tried['read']} read, "
        f"{tried['refused']} refused as documented | {time.monotonic() - started:.0f} |",
    )


def _undocumented(error: Exception, allowed: tuple[type[Exception], ...], named: str) -> str:
    """Return what is wrong with an error: a subclass comes from inside, as JSONDecodeError or UnicodeDecodeError."""
    text = str(error)
    if type(error) not in allowed:
        return f"{type(error).__name__} from inside: {text}"
    return "" if text.strip() and named in text else f"does not name {named}: {text!r}"


def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    return ConvNet().state_dict()


def _saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def _load(path: Path) -> None:
    load_weights(ConvNet(), path)


@pytest.mark.parametrize("kind", ["torch", "legacy", "bare", "safetensors", "index"])
@pytest.mark.parametrize("read", [read_contents, _load])
def test_weights(kind, read, tmp_path, record_property):
    state = _state()
    nested = {"state_dict": state, "epoch": 3, "args": {"lr": 0.1}}
    contents = {
        "torch": lambda: _saved(nested),
        "legacy": lambda: _saved(nested, _use_new_zipfile_serialization=False),
        "bare": lambda: pickle.dumps({"a": [1, (2, 3)], "b": {"c": "d"}}),
        "safetensors": lambda: save(state),
        "index": lambda: json.dumps({"weight_map": dict.fromkeys(state, "model.safetensors")}).encode(),
    }
    (tmp_path / "model.safetensors").write_bytes(save(state))
    names = {"safetensors": "weights.safetensors", "index": "model.safetensors.index.json"}
    named = "model.safetensors" if kind == "index" else None
    examples = EXAMPLES if read is read_contents else EXAMPLES // 5
    fuzz(
        tmp_path,
        names.get(kind, "weights.pt"),
        changed_bytes(contents[kind]()),
        read,
        record_property,
        examples=examples,
        named=named,
    )


def test_checkpoints(tmp_path, record_property):
    content = _saved({"diffkd": {"step": 1}, "state_dict": {"w": torch.ones(3)}})
    fuzz(tmp_path, "last.ckpt", changed_bytes(content), read_checkpoint, record_property, examples=EXAMPLES // 2)


def _coco() -> dict[str, Any]:
    boxes = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 16, 16], "iscrowd": 0, "area": 100.0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [], "segmentation": [[1, 1, 9, 1, 9, 9]]},
        {"id": 3, "image_id": 2, "category_id": 2, "segmentation": {"size": [32, 40], "counts": [100, 20, 1160]}},
    ]
    return {
        "images": [{"id": i, "file_name": name, "width": 40, "height": 32} for i, name in ((1, "a.png"), (2, "b.png"))],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": boxes,
    }


def _pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 32)).save(folder / name)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_coco(skip, stored, tmp_path, record_property):
    _pictures(tmp_path / "images")

    def read(path: Path) -> None:
        read_coco(path, tmp_path / "images", skip_bad=skip, as_stored=stored)

    content = _coco()
    texts = changed_values(content).map(lambda one: json.dumps(one).encode())
    raw = changed_bytes(json.dumps(content).encode())
    fuzz(tmp_path, "train.json", st.one_of(texts, texts, raw), read, record_property, named=str(tmp_path))


@pytest.mark.parametrize("skip", [False, True])
def test_voc(skip, tmp_path, record_property):
    _pictures(tmp_path / "train")
    content = (
        b'<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.png</filename><size><width>40</width><height>32'
        b"</height></size><object><name>cat</name><difficult>0</difficult><bndbox><xmin>4</xmin><ymin>4</ymin><xmax>20"
        b"</xmax><ymax>20</ymax></bndbox></object></annotation>"
    )

    def read(path: Path) -> None:
        read_voc(find_voc_split(tmp_path, "train"), skip_bad=skip)

    fuzz(tmp_path, "train/a.xml", changed_bytes(content), read, record_property, named=str(tmp_path))


@pytest.mark.parametrize("skip", [False, True])
def test_yolo_labels(skip, tmp_path, record_property):
    _pictures(tmp_path / "images" / "train")
    content = b"0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.4 0.1 0.4 0.4\n0 0.5 0.5 0.2 0.4 0.45 0.45 2\n"

    def read(path: Path) -> None:
        read_yolo(tmp_path, ["images/train"], ["cat", "dog"], skip_bad=skip)

    fuzz(tmp_path, "labels/train/a.txt", changed_bytes(content), read, record_property, named=str(tmp_path))


def test_yolo_facts(tmp_path, record_property):
    content = {"path": ".", "train": "images/train", "val": ["images/val"], "names": {"0": "cat", "1": "dog"}, "nc": 2}
    content |= {"kpt_shape": [17, 3]}

    def read(path: Path) -> None:
        read_yolo_facts(path)
        read_yolo_layout(path)

    texts = changed_values(content).map(lambda one: yaml.safe_dump(one, allow_unicode=True).encode("utf-8", "replace"))
    raw = changed_bytes(yaml.safe_dump(content).encode())
    fuzz(tmp_path, "data.yaml", st.one_of(texts, raw), read, record_property)


def _image(kind: str, mode: str) -> bytes:
    stream = io.BytesIO()
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 3, (9, 12), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(stream, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "TIFF", "WEBP") else {}))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("JPEG", "RGB"),
        ("TIFF", "L"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("WEBP", "RGB"),
        ("PPM", "L"),
    ],
)
def test_pictures(kind, mode, tmp_path, record_property):
    def read(path: Path) -> None:
        upright_size(path)
        read_orientation(path)
        read_rgb(path)

    fuzz(tmp_path, f"picture.{kind.lower()}", changed_bytes(_image(kind, mode)), read, record_property)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_masks(kind, tmp_path, record_property):
    read = MaskCode(3).read
    fuzz(tmp_path, f"mask.{kind.lower()}", changed_bytes(_image(kind, "L")), read, record_property)


def test_arrays(tmp_path, record_property):
    stream = io.BytesIO()
    np.savez(stream, images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4), classes=np.array(list("abcd")))

    def read(path: Path) -> None:
        data, classes = read_npz(path)
        check_image_set(data, len(classes or "abcd"), str(path))

    fuzz(tmp_path, "train.npz", changed_bytes(stream.getvalue()), read, record_property)


@pytest.mark.parametrize("name", ["images.gz", "images"])
def test_idx(name, tmp_path, record_property):
    content = bytes([0, 0, 8, 3]) + struct.pack(">III", 2, 28, 28) + bytes(2 * 784)

    def read(path: Path) -> None:
        read_idx(path, 3)

    fuzz(
        tmp_path, name, changed_bytes(gzip.compress(content) if name.endswith("gz") else content), read, record_property
    )


def test_cards(tmp_path, record_property):
    model = load_model("cifar/compact_resnet8", num_classes=3, in_channels=1)
    (tmp_path / "student.safetensors").write_bytes(save(dict(model.state_dict())))
    content = {
        "task": "classification",
        "model": "cifar/compact_resnet8",
        "num_classes": 3,
        "in_channels": 1,
        "image_size": [8, 8],
        "mean": [0.3],
        "std": [0.3],
        "classes": ["a", "b", "c"],
        "data": {"class_path": "diffkd.data.FashionSubset", "init_args": {"batch_size": 3}},
        "detection": None,
        "segmentation": None,
    }

    def read(path: Path) -> None:
        weights = path.with_suffix(".safetensors")
        rebuild(weights, read_card(weights))

    texts = changed_values(content).map(lambda one: json.dumps(one).encode())
    raw = changed_bytes(json.dumps(content).encode())
    fuzz(tmp_path, "student.json", st.one_of(texts, raw), read, record_property, named="", examples=EXAMPLES // 2)


def test_lists_of_classes(tmp_path, record_property):
    def read(path: Path) -> None:
        class_names(path, tmp_path)

    fuzz(tmp_path, "classes.txt", changed_bytes(b"cat\ndog\nbird\n"), read, record_property)


@pytest.mark.parametrize("name", ["colors.txt", "colors.json", "colors.csv"])
def test_tables_of_colours(name, tmp_path, record_property):
    contents = {
        "colors.txt": b"cat 10 20 30\ndog: 1, 2, 3\n",
        "colors.json": b'{"cat": [10, 20, 30], "dog": [1, 2, 3]}',
        "colors.csv": b"name,r,g,b\ncat,10,20,30\ndog,1,2,3\n",
    }

    def read(path: Path) -> None:
        class_colors(path, tmp_path)

    fuzz(tmp_path, name, changed_bytes(contents[name]), read, record_property)


def test_histories(tmp_path, record_property):
    content = b"epoch,step,val/top1,seconds\n1,10,0.5,3.2\n2,20,0.6,6.1\n"

    def read(path: Path) -> None:
        read_csv(path)

    fuzz(tmp_path, "metrics.csv", changed_bytes(content), read, record_property)


def test_configurations(tmp_path, record_property):
    content = {
        "student": "cifar/compact_resnet8",
        "teacher": "cifar/compact_resnet14",
        "method": {"class_path": "diffkd.DiffKD", "init_args": {"ae_channels": 8}},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "data": {"class_path": "diffkd.data.FashionSubset", "init_args": {"batch_size": 8}},
        "pairs": "auto",
        "epochs": 1,
        "out": "run",
    }

    def read(path: Path) -> None:
        values_of_fit([str(path)])

    texts = changed_values(content).map(lambda one: yaml.safe_dump(one, allow_unicode=True).encode("utf-8", "replace"))
    raw = changed_bytes(yaml.safe_dump(content).encode())
    contents = st.one_of(texts, raw)
    allowed = (UsageError, FileNotFoundError)
    fuzz(
        tmp_path,
        "recipe.yaml",
        contents,
        read,
        record_property,
        examples=EXAMPLES // 25 or 1,
        allowed=allowed,
        named="",
    )


@pytest.mark.parametrize(
    "name", ["train.json", "a.xml", "data.yaml", "weights.pt", "run/config.yaml", "run/result.json"]
)
def test_inspect(name, tmp_path, record_property, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("student: cifar/resnet20\nepochs: 1\n", encoding="utf-8")
    (run / "metrics.csv").write_text("epoch,top1\n1,0.5\n", encoding="utf-8")
    row = {"epoch": 1, "top1": 0.5}
    contents: dict[str, st.SearchStrategy[bytes]] = {
        "train.json": changed_values(_coco()).map(lambda one: json.dumps(one).encode()),
        "a.xml": changed_bytes(b"<annotation><filename>a.png</filename><object><name>a</name></object></annotation>"),
        "data.yaml": changed_bytes(b"names: [a, b]\ntrain: images/train\nval: images/val\npath: .\n"),
        "weights.pt": changed_bytes(_saved({"model": _state(), "args": {"a": 1}})),
        "run/config.yaml": changed_bytes(b"student: cifar/resnet20\nmethod: {class_path: diffkd.KD}\nepochs: 1\n"),
        "run/result.json": changed_values({"score": "top1", "last": row, "best": row}).map(
            lambda one: json.dumps(one).encode()
        ),
    }

    def read(path: Path) -> None:
        inspect(str(path.parent if path.parent == run else path))
        capsys.readouterr()

    named = "run" if name.startswith("run/") else None
    fuzz(tmp_path, name, contents[name], read, record_property, named=named, examples=EXAMPLES // 2)
