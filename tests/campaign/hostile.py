"""Files that somebody hostile would send: written by code, never stored.

Each case writes its files into a folder, and returns the words of the command that reads them.
"""

import codecs
import functools
import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

CANARY = "canary"
"""Name of the file that every payload would write."""

Case = Callable[[Path], list[str]]

_TINY = Path(__file__).parents[1] / "tiny_models.py"
ESCAPE = "\x1b]0;owned\x07\x1b[31m"
NAMES = {
    "escape": f"cat{ESCAPE}",
    "lines": "cat\ndiffkd: all is well\r",
    "html": "<img src=x onerror=alert(1)>",
    "mathtext": "$\\frac{$",
    "markup": "[red]cat[/nothing]",
    "format": "{0.__class__.__mro__} %s %n",
    "rtl": "cat\u202egnp.exe",
    "long": "c" * 100_000,
    "surrogate": "cat\ud800",
    "empty": "",
    "dots": "../../../../etc/passwd",
    "absolute": "/etc/passwd",
    "null": "cat\0dog",
    "windows": "C:\\Windows\\win.ini",
    "device": "/dev/zero",
}


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    found: dict[str, Case] = {}
    for group in (
        _pickles,
        _opcodes,
        _safetensors,
        _archives,
        _shards,
        _yaml,
        _json,
        _cards,
        _xml,
        _images,
        _arrays,
        _names,
    ):
        for name, case in group():
            assert name not in found, name
            found[name] = case
    return found


# Weights --------------------------------------------------------------------------------------------------------------


def _inspected(folder: Path, name: str, content: bytes) -> list[str]:
    (folder / name).write_bytes(content)
    return ["inspect", str(folder / name), "--model=cifar/compact_resnet8", "--num_classes=10", "--in_channels=1"]


def _payload(folder: Path) -> str:
    return f"touch {folder / CANARY}"


def _written(folder: Path) -> str:
    return f"open({str(folder / CANARY)!r}, 'w').close()"


# What a pickle would call, with its arguments.
_CALLS: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "os system": lambda folder: (_payload(folder),),
    "posix system": lambda folder: (_payload(folder),),
    "nt system": lambda folder: (_payload(folder),),
    "subprocess Popen": lambda folder: (["touch", str(folder / CANARY)],),
    "subprocess check_output": lambda folder: (["touch", str(folder / CANARY)],),
    "builtins eval": lambda folder: (_written(folder),),
    "builtins exec": lambda folder: (_written(folder),),
    "__builtin__ eval": lambda folder: (_written(folder),),
    "builtins open": lambda folder: (str(folder / CANARY), "w"),
    "builtins getattr": lambda folder: ("os", "system"),
    "builtins __import__": lambda folder: ("antigravity",),
    "importlib import_module": lambda folder: ("antigravity",),
    "runpy run_path": lambda folder: (str(folder / "payload.py"),),
    "pty spawn": lambda folder: (["touch", str(folder / CANARY)],),
    "webbrowser open": lambda folder: ("http://example.org",),
    "ctypes CDLL": lambda folder: ("libc.so.6",),
    "timeit timeit": lambda folder: (_written(folder),),
    "pdb run": lambda folder: (_written(folder),),
    "cProfile run": lambda folder: (_written(folder),),
    "shutil rmtree": lambda folder: (str(folder),),
    "shutil copy": lambda folder: (__file__, str(folder / CANARY)),
    "pathlib Path.touch": lambda folder: (folder / CANARY,),
    "code InteractiveInterpreter": lambda folder: (),
    "functools partial": lambda folder: (os.system, _payload(folder)),
    "operator attrgetter": lambda folder: ("system",),
    "torch load": lambda folder: (str(folder / "other.pt"),),
    "torch.hub load": lambda folder: (str(folder), "evil"),
    "torch.utils.collect_env run": lambda folder: (_payload(folder),),
    "torch._inductor.codecache PyCodeCache.load": lambda folder: (_written(folder),),
    "numpy load": lambda folder: (str(folder / "other.npy"),),
    "numpy.f2py.crackfortran myeval": lambda folder: (_written(folder),),
    "numpy.testing._private.utils runstring": lambda folder: (_written(folder), {}),
    "diffkd.commands.cli main": lambda folder: (["recipes"],),
    "tempfile NamedTemporaryFile": lambda folder: (),
    "smtplib SMTP": lambda folder: ("127.0.0.1",),
    "socket create_connection": lambda folder: (("127.0.0.1", 9),),
    "idlelib.pyshell ModifiedInterpreter": lambda folder: (),
    "logging.config dictConfig": lambda folder: ({"version": 1},),
    "distutils.file_util write_file": lambda folder: (str(folder / CANARY), ["owned"]),
    "asyncio.unix_events _UnixSubprocessTransport._start": lambda folder: (),
}


class _Named:
    """Stands for a function in the pickler."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes a call of a function by its name, which need not exist."""

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        """Save a value."""
        if isinstance(value, _Named):
            if self.proto >= 4:
                self.save(value.module)
                self.save(value.name)
                self.write(pickle.STACK_GLOBAL)
            else:
                self.write(b"c" + f"{value.module}\n{value.name}\n".encode())
            return
        super().save(value, save_persistent_id)


def _call(name: str, arguments: tuple[Any, ...], protocol: int, beside: bool) -> bytes:
    """Return a pickle that calls a function, alone or beside weights that look right."""
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol)
    if protocol >= 2:
        stream.write(pickle.PROTO + bytes([protocol]))
    if beside:
        stream.write(b"(" + pickle.MARK if False else b"")
    pickler.save(_Named(*name.split(" ")))
    pickler.save(tuple(str(one) if isinstance(one, Path) else one for one in arguments if not callable(one)))
    stream.write(pickle.REDUCE)
    if beside:
        body = stream.getvalue()
        start = pickle.PROTO + bytes([protocol]) if protocol >= 2 else b""
        return start + b"}(X\x05\x00\x00\x00extra" + body[len(start) :] + b"u."
    return stream.getvalue() + pickle.STOP


def _as_torch_file(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def _as_legacy_file(content: bytes) -> bytes:
    numbers = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(one, 2) for one in numbers) + content + pickle.dumps([], 2)


def _pickles() -> Iterator[tuple[str, Case]]:
    for number, (name, arguments) in enumerate(_CALLS.items()):
        # Each in its own protocol and container, and the usual ones in all of them.
        kinds = [(number % 5 + 1, ("bare", "torch", "legacy")[number % 3])]
        if number < 4:
            kinds = [(protocol, kind) for protocol in (0, 2, 4) for kind in ("bare", "torch", "legacy")]
        for protocol, kind in kinds:

            def case(
                folder: Path,
                name: str = name,
                arguments: Callable[[Path], tuple[Any, ...]] = arguments,
                protocol: int = protocol,
                kind: str = kind,
            ) -> list[str]:
                (folder / "payload.py").write_text(_written(folder), encoding="utf-8")
                content = _call(name, arguments(folder), protocol, beside=protocol == 2)
                wrap = {"bare": bytes, "torch": _as_torch_file, "legacy": _as_legacy_file}[kind]
                return _inspected(folder, "weights.pt", wrap(content))

            yield f"pickle: {name}, protocol {protocol}, {kind}", case


def _opcodes() -> Iterator[tuple[str, Case]]:
    laughs = (
        b"\x80\x02]q\x00("
        + b"".join(
            b"]"
            + pickle.LONG_BINPUT
            + struct.pack("<I", n)
            + b"("
            + b"j"
            + struct.pack("<I", n - 1)
            + b"".join([b"j" + struct.pack("<I", n - 1)] * 9)
            + b"e"
            for n in range(1, 60)
        )
        + b"e."
    )
    sets = b"\x80\x04" + b"c__builtin__\nset\n" + b"".join(b"(" for _ in range(50)) + b"l\x85R" + b"."
    contents: dict[str, bytes] = {
        "inst": b"(S'touch CANARY'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'touch CANARY'\no.",
        "newobj": b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch CANARY\x85\x81.",
        "newobj_ex": b"\x80\x04cos\nsystem\nX\x0c\x00\x00\x00touch CANARY\x85}\x92.",
        "stack global by parts": b"\x80\x04X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93"
        + b"X\x0c\x00\x00\x00touch CANARY\x85R.",
        "dotted global": b"\x80\x04X\x07\x00\x00\x00pathlibX\x0d\x00\x00\x00os.system.foo\x93X\x01\x00\x00\x00a\x85R.",
        "build with a state": b"\x80\x02ccollections\nOrderedDict\n)R}X\x08\x00\x00\x00__dict__}sb.",
        "setstate by build": b"\x80\x02cos\n_wrap_close\n)\x81}X\x03\x00\x00\x00cmdX\x01\x00\x00\x00asb.",
        "extension": b"\x80\x02\x82\x01.",
        "extension of 4 bytes": b"\x80\x02\x84\x01\x00\x00\x00.",
        "persistent id": b"\x80\x02X\x04\x00\x00\x00evilQ.",
        "persistent id as text": b"Pevil\n.",
        "a storage of no file": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ.",
        "deep lists": b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "deep tuples": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
        "deep dictionaries": b"\x80\x02" + b"}K\x01" * 500_000 + b"N" + b"s" * 500_000 + b".",
        "a billion laughs": laughs,
        "marks": b"\x80\x02" + b"(" * 4_000_000 + b".",
        "a length of text that lies": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
        "a length of bytes that lies": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
        "a byte array that lies": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.",
        "a frame that lies": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
        "a long integer": b"\x80\x02\x8b" + struct.pack("<i", 20_000_000) + b"\x7f" * 20_000_000 + b".",
        "a negative length": b"\x80\x02\x8b" + struct.pack("<i", -5) + b".",
        "an integer of many digits": b"I" + b"9" * 2_000_000 + b"\n.",
        "a memo of a large number": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
        "a memo that is not there": b"\x80\x02j" + struct.pack("<I", 7) + b".",
        "duplicates": b"\x80\x02}" + b"2" * 4_000_000 + b".",
        "sets of marks": sets,
        "an empty stack": b"\x80\x02R.",
        "no end": b"\x80\x02}" * 1000,
        "an unknown code": b"\x80\x02\xff\xff.",
        "protocol 255": b"\x80\xff}.",
        "a name with escapes": b"\x80\x02c" + ESCAPE.encode() + b"\n" + ESCAPE.encode() + b"\n)R.",
        "a key with escapes": b"\x80\x02}X"
        + struct.pack("<I", len(ESCAPE))
        + ESCAPE.encode()
        + b"cargparse\nNamespace\n)Rs.",
    }
    for name, content in contents.items():
        for kind, wrap in (("bare", bytes), ("torch", _as_torch_file)):
            if kind == "torch" and len(content) > 1_000_000:
                continue

            def case(folder: Path, content: bytes = content, wrap: Any = wrap) -> list[str]:
                body = content.replace(b"CANARY", b"CANARY")  # relative: the process works in the folder
                return _inspected(folder, "weights.pt", wrap(body))

            yield f"opcodes: {name}, {kind}", case

    def expanded(folder: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> list[str]:
        torch.save({"w": torch.ones(4)}, folder / "good.pt")
        stream = io.BytesIO()
        with zipfile.ZipFile(folder / "good.pt") as good, zipfile.ZipFile(stream, "w") as archive:
            for entry in good.infolist():
                content = good.read(entry)
                if entry.filename.endswith("data.pkl"):
                    content = content.replace(b"K\x04\x85", _tuple(size), 1)
                    content = content.replace(b"K\x01\x85", _tuple(stride), 1)
                    content = content.replace(b"QK\x00", b"Q" + _integer(offset), 1)
                archive.writestr(entry.filename, content)
        return _inspected(folder, "weights.pt", stream.getvalue())

    for name, view in {
        "a tensor of 2^40 numbers": ((2**40,), (0,), 0),
        "a tensor of 2^62 numbers": ((2**31, 2**31), (0, 0), 0),
        "a view beyond its storage": ((4,), (1,), 2**20),
        "a view before its storage": ((4,), (1,), -4),
        "a negative stride": ((4,), (-1,), 3),
        "a negative size": ((-4,), (1,), 0),
        "an odd number of strides": ((2, 2), (1,), 0),
        "overlapping rows": ((4, 4), (1, 1), 0),
        "a thousand dimensions": ((1,) * 1000, (1,) * 1000, 0),
    }.items():
        yield f"tensors: {name}", functools.partial(lambda folder, view: expanded(folder, *view), view=view)


def _integer(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _safetensors() -> Iterator[tuple[str, Case]]:
    def file(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + body

    def tensors(entries: dict[str, Any], body: int = 16) -> bytes:
        return file(json.dumps(entries).encode(), bytes(body))

    good = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    contents = {
        "a header of 2^63 bytes": file(b"{}", length=2**63),
        "a header of 2^40 bytes": file(b"{}", length=2**40),
        "a header longer than the file": file(b"{}", length=1000),
        "a header of no bytes": file(b""),
        "a header that is no JSON": file(b"{not json"),
        "a header that is a list": file(b"[]"),
        "a header of 100,000 levels": file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a header that is no text": file(b'{"\xff\xfe": 1}'),
        "names twice": file(
            b'{"a":' + json.dumps(good).encode() + b',"a":' + json.dumps(good).encode() + b"}", bytes(16)
        ),
        "overlapping tensors": tensors({"a": good, "b": good}),
        "a tensor beyond the file": tensors({"a": {**good, "data_offsets": [0, 2**40], "shape": [2**38]}}),
        "a tensor that ends before it begins": tensors({"a": {**good, "data_offsets": [16, 0]}}),
        "a negative offset": tensors({"a": {**good, "data_offsets": [-16, 0]}}),
        "an unknown type": tensors({"a": {**good, "dtype": "F1024"}}),
        "a shape that overflows": tensors({"a": {**good, "shape": [2**33, 2**33]}}),
        "a negative shape": tensors({"a": {**good, "shape": [-4]}}),
        "a shape of floats": tensors({"a": {**good, "shape": [4.5]}}),
        "a hole": tensors({"a": {**good, "data_offsets": [16, 32]}}, 32),
        "100,000 empty tensors": tensors(
            {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}, 0
        ),
        "a name of a megabyte": tensors({"n" * 1_000_000: good}),
        "a name with escapes": tensors({ESCAPE: good}),
        "a name of 100,000 parts": tensors({"a." * 100_000 + "weight": good}),
        "metadata of another kind": tensors({"__metadata__": {"a": [1, 2]}, "w": good}),
        "metadata with escapes": tensors({"__metadata__": {"format": ESCAPE}, "w": good}),
        "half a body": tensors({"a": good}, 8),
    }
    for name, content in contents.items():
        yield f"safetensors: {name}", functools.partial(_inspected, name="weights.safetensors", content=content)


def _archives() -> Iterator[tuple[str, Case]]:
    def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED, comment: bytes = b"") -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as file:
            for name, content in entries.items():
                file.writestr(name, content)
            file.comment = comment
        return stream.getvalue()

    def link() -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            entry = zipfile.ZipInfo("archive/data.pkl")
            entry.external_attr = 0o120777 << 16
            file.writestr(entry, "/etc/passwd")
        return stream.getvalue()

    weights = pickle.dumps({"a": 1}, 2)
    lies = bytearray(archive({"archive/data.pkl": weights}, zipfile.ZIP_STORED))
    place = lies.rindex(b"PK\x01\x02")
    lies[place + 20 : place + 28] = struct.pack("<II", 2**31, 2**31)
    contents = {
        "a compressed gigabyte": lambda: archive({"archive/data.pkl": bytes(2**30)}),
        "a compressed gigabyte as storage": lambda: archive(
            {"archive/data.pkl": weights, "archive/data/0": bytes(2**30)}
        ),
        "names that lead out": lambda: archive(
            {"../../data.pkl": weights, "/etc/data.pkl": weights}, zipfile.ZIP_STORED
        ),
        "a link": link,
        "100,000 entries": lambda: archive(
            {f"archive/data/{i}": b"" for i in range(100_000)} | {"archive/data.pkl": weights}, 0
        ),
        "no entries": lambda: archive({}),
        "sizes that lie": lambda: bytes(lies),
        "names with escapes": lambda: archive({f"{ESCAPE}/data.pkl": weights}, 0),
        "a program": lambda: archive({"archive/data.pkl": weights, "archive/code/__torch__.py": b"import os"}, 0),
        "a zip inside a zip": lambda: archive({"archive/data.pkl": archive({"archive/data.pkl": bytes(2**26)})}, 0),
        "a directory that is cut off": lambda: archive({"archive/data.pkl": weights}, 0)[:-10],
    }
    for name, make in contents.items():
        yield (
            f"archives: {name}",
            functools.partial(lambda folder, make: _inspected(folder, "weights.pt", make()), make=make),
        )


def _shards() -> Iterator[tuple[str, Case]]:
    def case(folder: Path, index: Any) -> list[str]:
        text = index if isinstance(index, bytes) else json.dumps(index).encode()
        return _inspected(folder, "model.safetensors.index.json", text)

    for name in ("dots", "absolute", "null", "escape", "device", "empty", "surrogate", "long"):
        yield f"shards: a name, {name}", functools.partial(case, index={"weight_map": {"w": NAMES[name]}})
    yield "shards: itself", functools.partial(case, index={"weight_map": {"w": "model.safetensors.index.json"}})
    yield "shards: a million levels", functools.partial(case, index=b'{"weight_map":' + b"[" * 1_000_000)
    yield "shards: another kind", functools.partial(case, index={"weight_map": [1, 2]})

    def device(folder: Path) -> list[str]:
        (folder / "weights.pt").symlink_to("/dev/zero")
        return ["inspect", str(folder / "weights.pt")]

    def pipe(folder: Path) -> list[str]:
        os.mkfifo(folder / "weights.pt")
        return ["inspect", str(folder / "weights.pt")]

    yield "weights: a link to /dev/zero", device
    yield "weights: a pipe", pipe


# Values ---------------------------------------------------------------------------------------------------------------


def _fit(folder: Path, data: str = "FashionSubset", *words: str) -> list[str]:
    root = [f"--data.root={folder}"] if data != "FashionSubset" else []
    model = "retinanet/timm/test_resnet" if "Detection" in data else "cifar/compact_resnet8"
    model = "smp/unet/timm/test_resnet" if data in ("MaskFolder", "VocSegmentation") else model
    small = {"Detection": ["--data.min_size=32", "--data.max_size=64"], "Arrays": [], "FashionMNIST": []}
    root += small.get("Detection" if "Detection" in data else data, [])
    root += ["--data.num_workers=0"] if root and data not in ("Arrays", "FashionMNIST") else []
    run = ["--max_steps=1", "--epochs=1", "--progress=false", "--accelerator=cpu", f"--out={folder / 'run'}"]
    return ["fit", f"--student={model}", f"--data=diffkd.data.{data}", *root, *words, *run]


_BOMBS = {
    "anchors": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    "merges": "a: &a {k0: 1, k1: 1}\n"
    + "\n".join(
        f"{b}: &{b} {{<<: [{','.join(['*' + a] * 9)}], q{b}: 1}}" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "itself": "a: &a [*a]\nb: &b {<<: *b}",
    "levels": "[" * 20_000,
    "levels of mappings": "{a: " * 20_000,
    "tags": "a: !!python/object/apply:os.system ['touch CANARY']",
    "tags of modules": "a: !!python/module:antigravity",
    "tags of objects": "a: !!python/object/new:subprocess.Popen [['touch', 'CANARY']]",
    "tags of names": "a: !!python/name:os.system",
    "unknown tags": "a: !evil {b: 1}",
    "no text": "\ud800",
    "zeros": "\0\0\0",
    "a key of a megabyte": f"{'k' * 1_000_000}: 1",
    "a number of many digits": f"epochs: {'9' * 100_000}",
    "a number to the base of 60": f"epochs: {':'.join(['59'] * 20_000)}",
    "dates": "epochs: 9999-99-99",
    "keys of other kinds": "? [a, b]\n: 1\n? {c: d}\n: 2",
    "another document": "epochs: 1\n---\nepochs: 2",
}


def _text_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _yaml() -> Iterator[tuple[str, Case]]:
    def recipe(folder: Path, text: str) -> list[str]:
        (folder / "recipe.yaml").write_bytes(_text_bytes(text))
        return ["fit", str(folder / "recipe.yaml"), f"--out={folder / 'run'}", "--max_steps=1", "--progress=false"]

    def facts(folder: Path, text: str) -> list[str]:
        _yolo(folder)
        (folder / "data.yaml").write_bytes(_text_bytes(f"names: [cat]\n{text}"))
        return _fit(folder, "YoloDetection")

    for name, text in _BOMBS.items():
        yield f"recipe: {name}", functools.partial(recipe, text=text)
    for name in ("anchors", "merges", "itself", "levels", "tags", "no text", "a number to the base of 60"):
        yield f"data.yaml: {name}", functools.partial(facts, text=_BOMBS[name])
    for name in ("anchors", "tags", "levels", "merges"):

        def shown(folder: Path, text: str = _BOMBS[name]) -> list[str]:
            (folder / "data.yaml").write_bytes(_text_bytes(f"names: [cat]\n{text}"))
            return ["inspect", str(folder / "data.yaml")]

        yield f"inspect data.yaml: {name}", shown
    plain = "student: cifar/compact_resnet8\ndata: diffkd.data.FashionSubset\n"
    recipes = {
        "an optimiser that is a command": "optimizer: {class_path: os.system, init_args: {command: touch CANARY}}",
        "a method that is a command": "method: {class_path: subprocess.Popen, init_args: {args: [touch, CANARY]}}",
        "a student of another file": "student: payload.py:small",
        "a student of another module": "student: antigravity:fly",
        "a device as configuration": "config: /dev/zero",
        "trust from the file": "trust: [payload.py]\nstudent: payload.py:small",
        "an output elsewhere": "out: /proc/self/evil",
        "data of another module": "data: {class_path: antigravity.Data}",
        "weights that are a device": f"{plain}student_weights: /dev/zero",
        "a million epochs of nothing": "epochs: 1e400",
        "infinite rates": f"{plain}optimizer: {{class_path: SGD, init_args: {{lr: .inf}}}}",
        "a negative number of devices": f"{plain}devices: -5",
    }
    for name, text in recipes.items():

        def case(folder: Path, text: str = text) -> list[str]:
            (folder / "payload.py").write_text(f"{_written(folder)}\nsmall = print\n", encoding="utf-8")
            return recipe(folder, text)

        yield f"recipe: {name}", case


# Annotations ----------------------------------------------------------------------------------------------------------


def _picture(path: Path, size: tuple[int, int] = (40, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _yolo(folder: Path, line: str = "0 0.5 0.5 0.2 0.4") -> None:
    for split in ("train", "val"):
        _picture(folder / "images" / split / "a.png")
        text = folder / "labels" / split / "a.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_bytes(_text_bytes(line))


def coco(folder: Path) -> dict[str, Any]:
    """Write a picture, and return the content of a file of one box."""
    _picture(folder / "images" / "a.png")
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 32}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 16, 16]}],
    }


def _json() -> Iterator[tuple[str, Case]]:
    def raw(folder: Path, text: bytes) -> list[str]:
        coco(folder)
        for name in ("train", "val"):
            (folder / f"{name}.json").write_bytes(text)
        return _fit(folder, "CocoDetection")

    def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> list[str]:
        content = coco(folder)
        change(content)
        return raw(folder, json.dumps(content).encode())

    yield "coco: a million levels of lists", functools.partial(raw, text=b"[" * 1_000_000)
    yield "coco: a million levels of objects", functools.partial(raw, text=b'{"a":' * 1_000_000)
    yield (
        "coco: a million levels inside",
        functools.partial(raw, text=b'{"images":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    )
    yield "coco: a number of many digits", functools.partial(raw, text=b'{"images": ' + b"9" * 1_000_000 + b"}")
    yield "coco: no text", functools.partial(raw, text=b"\xff\xfe\x00")
    yield "coco: an escape instead of JSON", functools.partial(raw, text=ESCAPE.encode())
    for name, value in NAMES.items():
        yield (
            f"coco: a file name, {name}",
            functools.partial(changed, change=lambda c, v=value: c["images"][0].update(file_name=v)),
        )
        yield (
            f"coco: a class, {name}",
            functools.partial(changed, change=lambda c, v=value: c["categories"][0].update(name=v)),
        )
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "a million classes": lambda c: c.update(categories=[{"id": i, "name": f"c{i}"} for i in range(1_000_000)]),
        "a size of 2^31": lambda c: c["images"][0].update(width=2**31 - 1, height=2**31 - 1),
        "a size of 10^400": lambda c: c["images"][0].update(width=10**400),
        "boxes of 10^308": lambda c: c["annotations"][0].update(bbox=[1e308, 1e308, 1e308, 1e308]),
        "boxes that are no numbers": lambda c: c["annotations"][0].update(bbox=[float("nan")] * 4),
        "a box of many digits": lambda c: c["annotations"][0].update(bbox=[10**4000, 0, 1, 1]),
        "an id of many digits": lambda c: c["images"][0].update(id=10**4000),
        "a box of a million numbers": lambda c: c["annotations"][0].update(bbox=[1] * 1_000_000),
        "a polygon of a million corners": lambda c: c["annotations"][0].update(
            bbox=[], segmentation=[[1, 2] * 1_000_000]
        ),
        "counts of 2^62": lambda c: c["annotations"][0].update(
            bbox=[], segmentation={"size": [32, 40], "counts": [2**62, 2**62]}
        ),
        "counts that are text": lambda c: c["annotations"][0].update(
            bbox=[], segmentation={"size": [32, 40], "counts": "\x7f" * 100_000}
        ),
        "a size of counts of 2^40": lambda c: c["annotations"][0].update(
            bbox=[], segmentation={"size": [2**40, 2**40], "counts": "0"}
        ),
        "annotations of other kinds": lambda c: c.update(annotations=[None, 1, "a"]),
        "200,000 annotations of nothing": lambda c: c.update(annotations=[{}] * 200_000),
        "a name that is a list": lambda c: c["categories"][0].update(name=[["a"] * 100_000]),
    }
    for name, change in changes.items():
        yield f"coco: {name}", functools.partial(changed, change=change)
    lines = {
        "a class of 10^400": "1" + "0" * 400 + " 0.5 0.5 0.2 0.2",
        "numbers of 10^6 digits": "0 0." + "1" * 1_000_000 + " 0.5 0.2 0.2",
        "a million numbers": "0 " + "0.5 " * 1_000_000,
        "a million lines": "0 0.5 0.5 0.2 0.2\n" * 1_000_000,
        "escapes": f"{ESCAPE} 0.5 0.5 0.2 0.2",
        "no text": "\ud800",
        "infinities": "0 inf nan -inf 1e400",
    }
    for name, line in lines.items():

        def yolo(folder: Path, line: str = line) -> list[str]:
            _yolo(folder, line)
            (folder / "data.yaml").write_text("names: [cat]", encoding="utf-8")
            return _fit(folder, "YoloDetection")

        yield f"yolo: {name}", yolo
    for name in ("escape", "dots", "absolute", "null", "device", "lines", "surrogate"):

        def listed(folder: Path, value: str = NAMES[name]) -> list[str]:
            _yolo(folder)
            (folder / "data.yaml").write_text("names: [cat]\ntrain: list.txt\nval: images/val", encoding="utf-8")
            (folder / "list.txt").write_bytes(_text_bytes(value))
            return _fit(folder, "YoloDetection")

        yield f"yolo: a list, {name}", listed


def _cards() -> Iterator[tuple[str, Case]]:
    def case(folder: Path, card: Any, words: tuple[str, ...] = ()) -> list[str]:
        from diffkd.models import load_model

        torch.manual_seed(0)
        model = load_model("cifar/compact_resnet8", num_classes=10, in_channels=1)
        save_file(dict(model.state_dict()), folder / "student.safetensors")
        good = {
            "task": "classification",
            "model": "cifar/compact_resnet8",
            "num_classes": 10,
            "in_channels": 1,
            "image_size": [28, 28],
            "mean": [0.3],
            "std": [0.3],
            "classes": [f"c{i}" for i in range(10)],
            "data": {"class_path": "diffkd.data.FashionSubset", "init_args": {}},
        }
        content = card if isinstance(card, bytes) else json.dumps(good | card).encode()
        (folder / "student.json").write_bytes(content)
        (folder / "payload.py").write_text(f"{_written(folder)}\nsmall = print\n", encoding="utf-8")
        return ["export", str(folder / "student.safetensors"), f"--out={folder / 'out.safetensors'}", *words]

    def taught(folder: Path, card: Any) -> list[str]:
        case(folder, card)
        teacher = ["--teacher=cifar/compact_resnet8", f"--teacher_weights={folder / 'student.safetensors'}"]
        return _fit(folder, "FashionSubset", *teacher, "--method=diffkd.KD")

    values: dict[str, Any] = {
        "a model of another file": {"model": "payload.py:small"},
        "a model of a module": {"model": "antigravity:fly"},
        "data of a module": {"data": {"class_path": "os.system", "init_args": {"command": "touch CANARY"}}},
        "data with a method": {"data": {"class_path": "diffkd.data.ImageFolder", "init_args": {"root": "/dev/zero"}}},
        "10^12 classes": {"num_classes": 10**12},
        "10^400 classes": {"num_classes": 10**400},
        "classes below zero": {"num_classes": -1},
        "images of 10^9 pixels": {"image_size": [10**9, 10**9]},
        "image size of text": {"image_size": "evil"},
        "a mean that is no number": {"mean": [float("nan")], "std": [0.0]},
        "a mean of another kind": {"mean": "evil"},
        "names with escapes": {"classes": [ESCAPE] * 10},
        "a million names": {"classes": [f"c{i}" for i in range(1_000_000)]},
        "a task with escapes": {"task": ESCAPE},
        "a model with escapes": {"model": f"cifar/{ESCAPE}"},
        "a model that leads out": {"model": "hf/../../../etc"},
        "a million levels": b'{"model":' + b"[" * 1_000_000,
        "a list": b"[]",
        "no text": b"\xff\xff",
        "detection of another kind": {"task": "detection", "detection": {"norm": "evil"}},
    }
    for name, card in values.items():
        yield f"card of a teacher: {name}", functools.partial(taught, card=card)
    for name in (
        "a model of another file",
        "a model of a module",
        "data of a module",
        "a million levels",
        "10^12 classes",
    ):
        yield (
            f"card of an export to ONNX: {name}",
            functools.partial(
                lambda folder, card: [*case(folder, card)[:-1], f"--out={folder / 'out.pt2'}"], card=values[name]
            ),
        )
        yield (
            f"card of a test: {name}",
            functools.partial(
                lambda folder, card: ["test", case(folder, card)[1], "--accelerator=cpu"], card=values[name]
            ),
        )


def _xml() -> Iterator[tuple[str, Case]]:
    box = "<bndbox><xmin>4</xmin><ymin>4</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"

    def case(folder: Path, content: bytes) -> list[str]:
        for split in ("train", "val"):
            _picture(folder / split / "a.png")
            (folder / split / "a.xml").write_bytes(content)
        return _fit(folder, "VocDetection")

    def annotation(name: str = "cat", start: str = "", size: str = "", file: str = "") -> bytes:
        where = f"<filename>{file}</filename>" if file else ""
        text = f"{start}<annotation>{where}{size}<object><name>{name}</name>{box}</object></annotation>"
        return _text_bytes(text)

    laughs = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))
    contents = {
        "a billion laughs": annotation("&l9;", f'<!DOCTYPE x [<!ENTITY l0 "ha">{laughs}]>'),
        "a quadratic entity": annotation("&a;" * 50_000, f'<!DOCTYPE x [<!ENTITY a "{"a" * 50_000}">]>'),
        "an entity of a file": annotation("&f;", '<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]>'),
        "an entity of the network": annotation("&f;", '<!DOCTYPE x [<!ENTITY f SYSTEM "http://127.0.0.1/f">]>'),
        "a parameter entity": annotation("cat", '<!DOCTYPE x [<!ENTITY % f SYSTEM "file:///etc/passwd">%f;]>'),
        "a million levels": b"<annotation>" + b"<a>" * 1_000_000,
        "a million levels that end": b"<annotation>" + b"<a>" * 200_000 + b"</a>" * 200_000 + b"</annotation>",
        "a million attributes": b"<annotation " + b" ".join(b'a%d="1"' % i for i in range(300_000)) + b"/>",
        "a name of ten megabytes": annotation("c" * 10_000_000),
        "another encoding": b'<?xml version="1.0" encoding="utf-7"?><annotation/>',
        "an encoding that runs code": b'<?xml version="1.0" encoding="unicode_escape"?><annotation/>',
        "an encoding that is compressed": b'<?xml version="1.0" encoding="zlib_codec"?>' + zlib.compress(bytes(10**7)),
        "an encoding of bytes": b'<?xml version="1.0" encoding="hex_codec"?>3c613e',
        "two encodings": codecs.BOM_UTF16_LE
        + '<?xml version="1.0" encoding="utf-8"?><annotation/>'.encode("utf-16-le"),
        "zeros": bytes(1000),
        "a size of 10^300": annotation(size=f"<size><width>{10**300}</width><height>1</height></size>"),
        "a size that is infinite": annotation(size="<size><width>inf</width><height>nan</height></size>"),
        "a file of its own": annotation(file="../../../../etc/passwd"),
        "a file that is absolute": annotation(file="/etc/passwd"),
        "a device": annotation(file="/dev/zero"),
        "HTML as a class": annotation("&lt;img src=x onerror=alert(1)&gt;"),
        "mathematics as a class": annotation("$\\frac{$"),
        "a style sheet": annotation(start='<?xml-stylesheet href="http://127.0.0.1/x.xsl"?>'),
        "an inclusion": b'<annotation xmlns:xi="http://www.w3.org/2001/XInclude">'
        + b'<xi:include href="/etc/passwd"/></annotation>',
    }
    for name, content in contents.items():
        yield f"voc: {name}", functools.partial(case, content=content)


# Pictures and arrays --------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *chunks: bytes, body: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def pictures() -> dict[str, Callable[[], bytes]]:
    """Return makers of hostile pictures by name."""
    rows = zlib.compress(b"".join(b"\0" + bytes(40 * 3) for _ in range(32)), 9)
    bomb = zlib.compress(bytes(200_000_000), 9)
    return {
        "a PNG of 2^31 pixels a side": lambda: _png(2**31 - 1, 2**31 - 1, body=rows),
        "a PNG of 16,000 pixels a side": lambda: _png(16_000, 16_000, body=zlib.compress(bytes(16_000 * 48_001), 9)),
        "a PNG whose data are too long": lambda: _png(40, 32, body=bomb),
        "a PNG whose data are too short": lambda: _png(4000, 3200, body=rows),
        "a PNG of no size": lambda: _png(0, 0, body=rows),
        "a text that is a bomb": lambda: _png(40, 32, _chunk(b"zTXt", b"Comment\0\0" + bomb), body=rows),
        "an orientation that is a bomb": lambda: _png(
            40, 32, _chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb), body=rows
        ),
        "an international text that is a bomb": lambda: _png(
            40, 32, _chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb), body=rows
        ),
        "a profile that is a bomb": lambda: _png(40, 32, _chunk(b"iCCP", b"icc\0\0" + bomb), body=rows),
        "a chunk longer than the file": lambda: b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR",
        "20,000 texts": lambda: _png(40, 32, *[_chunk(b"tEXt", b"k%d\0v" % i) for i in range(20_000)], body=rows),
        "an orientation of 2^32": lambda: _png(40, 32, _chunk(b"eXIf", _exif(2**31)), body=rows),
        "EXIF that lies": lambda: _png(40, 32, _chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f"), body=rows),
        "a program of PostScript": lambda: _POSTSCRIPT.encode(),
        "a program of PostScript with a preview": lambda: (
            b"\xc5\xd0\xd3\xc6"
            + struct.pack("<IIIIIIH", 30, len(_POSTSCRIPT), 0, 0, 0, 0, 65535)
            + _POSTSCRIPT.encode()
        ),
        "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "a page of HTML": lambda: b"<!DOCTYPE html><script>alert(1)</script>",
        "a TIFF whose directory is itself": lambda: b"II*\0\x08\0\0\0\x00\x00\x08\0\0\0",
        "a TIFF of many entries": lambda: b"II*\0\x08\0\0\0\xff\xff" + bytes(12) * 65535,
        "a TIFF of 2^31 pixels": lambda: _tiff(2**31 - 1, 2**31 - 1),
        "a TIFF of many strips": lambda: _tiff(40, 32, strips=2**28),
        "a BMP of 2^31 pixels": lambda: (
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0)
        ),
        "a GIF of 65,535 pixels": lambda: (
            b"GIF89a"
            + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0)
            + bytes(6)
            + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;"
        ),
        "a JPEG of 65,500 pixels": lambda: (
            b"\xff\xd8\xff\xc0\0\x11\x08"
            + struct.pack(">HH", 65500, 65500)
            + b"\x03\x01\x11\0\x02\x11\x01\x03\x11\x01\xff\xda\0\x0c\x03\x01\0\x02\x11\x03\x11\0\x3f\0\xff\xd9"
        ),
        "a PPM of 10^9 pixels": lambda: b"P6 1000000000 1000000000 255\n\0",
        "a PPM of many digits": lambda: b"P6 " + b"9" * 1_000_000 + b" 1 255\n",
        "a WebP that is cut off": lambda: b"RIFF\xff\xff\xff\x7fWEBPVP8 ",
        "nothing": lambda: b"",
        "noise": lambda: np.random.default_rng(0).bytes(10_000),
    }


_POSTSCRIPT = (
    "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 32\n%%EndComments\n(CANARY) (w) file closefile\nshowpage\n%%EOF\n"
)


def _exif(orientation: int) -> bytes:
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIII", 0x0112, 4, 1, orientation, 0)


def _tiff(width: int, height: int, strips: int = 1) -> bytes:
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (278, height), (277, 1)]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    body += struct.pack("<HHII", 273, 4, strips, 8) + struct.pack("<HHII", 279, 4, strips, 8)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 9) + body + bytes(4)


def _images() -> Iterator[tuple[str, Case]]:
    def classes(folder: Path, make: Callable[[], bytes], *words: str) -> list[str]:
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                _picture(folder / split / name / "a.png")
            (folder / split / "cat" / "evil.png").write_bytes(make())
        size = ("--data.image_size=32", "--data.batch_size=4")
        return _fit(folder, "ImageFolder", *size, *words)

    def masks(folder: Path, make: Callable[[], bytes], *words: str) -> list[str]:
        for split in ("train", "val"):
            _picture(folder / split / "images" / "a.png")
            mask = np.zeros((32, 40), np.uint8)
            mask[:16] = 1
            (folder / split / "masks").mkdir(parents=True)
            Image.fromarray(mask).save(folder / split / "masks" / "a.png")
        _picture(folder / "train" / "images" / "evil.png")
        (folder / "train" / "masks" / "evil.png").write_bytes(make())
        size = ("--data.num_classes=2", "--data.crop_size=[32,32]", "--data.batch_size=1")
        return _fit(folder, "MaskFolder", *size, *words)

    for name, make in pictures().items():
        yield f"picture: {name}", functools.partial(classes, make=make)
    for name in list(pictures())[::3]:
        yield (
            f"picture, skipped: {name}",
            functools.partial(
                lambda folder, make: classes(folder, make, "--data.on_bad_image=skip"), make=pictures()[name]
            ),
        )
    for name in list(pictures())[1::3]:
        yield f"mask: {name}", functools.partial(masks, make=pictures()[name])


def _arrays() -> Iterator[tuple[str, Case]]:
    def header(text: str) -> bytes:
        body = text.encode() + b"\n"
        return b"\x93NUMPY\x01\0" + struct.pack("<H", len(body)) + body

    def described(shape: str, kind: str = "'|u1'") -> bytes:
        return header(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}")

    def case(folder: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> list[str]:
        np.savez(folder / "good.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4) % 2)
        with zipfile.ZipFile(folder / "good.npz") as good:
            whole = {name: good.read(name) for name in good.namelist()}
        with zipfile.ZipFile(folder / "train.npz", "w", compression) as archive:
            for name, content in (whole | entries).items():
                archive.writestr(name, content)
        words = [f"--data.train={folder / 'train.npz'}", f"--data.test={folder / 'good.npz'}"]
        fit = _fit(folder, "Arrays", *words)
        return [word for word in fit if not word.startswith("--data.root")]

    class Bomb:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def __reduce__(self) -> Any:
            return os.system, (_payload(self.folder),)

    def pickled(folder: Path) -> list[str]:
        stream = io.BytesIO()
        np.save(stream, np.array([Bomb(folder)], dtype=object), allow_pickle=True)
        return case(folder, {"images.npy": stream.getvalue()})

    def many(folder: Path, value: int) -> list[str]:
        stream = io.BytesIO()
        np.save(stream, np.array([0, 1, 2, value]))
        return case(folder, {"labels.npy": stream.getvalue()})

    yield "npz: a pickle", pickled
    entries = {
        "2^40 images": {"images.npy": described(f"({2**40}, 8, 8, 3)")},
        "2^62 images": {"images.npy": described(f"({2**62}, 8, 8, 3)")},
        "a negative shape": {"images.npy": described("(-4, 8, 8, 3)")},
        "a shape of text": {"images.npy": described("('a',)")},
        "a header that is code": {"images.npy": header("__import__('os').system('touch CANARY')")},
        "a header of many levels": {"images.npy": header("(" * 30_000)},
        "objects": {"images.npy": described("(4,)", "'|O'")},
        "records": {"images.npy": described("(4,)", "[('a', '|u1'), ('b', '|O')]")},
        "names of classes with escapes": {"classes.npy": _saved(np.array([ESCAPE, "<b>"]))},
        "names that lead out": {"../../evil.npy": described("(4,)"), "/etc/evil.npy": described("(4,)")},
        "a version of its own": {"images.npy": b"\x93NUMPY\x09\0" + bytes(100)},
    }
    for name, files in entries.items():
        yield f"npz: {name}", functools.partial(case, entries=files)
    size = 3 * 2**30
    yield (
        "npz: three gigabytes of zeros",
        functools.partial(
            lambda folder: case(
                folder, {"images.npy": described(f"({size // 192}, 8, 8, 3)") + bytes(size)}, zipfile.ZIP_DEFLATED
            )
        ),
    )
    for value in (10**6, 2**31, 2**62, -1, -(2**63)):
        yield f"npz: the class {value}", functools.partial(many, value=value)

    def idx(folder: Path, images: bytes) -> list[str]:
        for split, count in (("train", 4), ("t10k", 4)):
            content = bytes([0, 0, 8, 3]) + struct.pack(">III", count, 28, 28) + bytes(count * 784)
            (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
            labels = bytes([0, 0, 8, 1]) + struct.pack(">I", count) + bytes(range(count))
            (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
        (folder / "train-images-idx3-ubyte.gz").write_bytes(images)
        return _fit(folder, "FashionMNIST")

    big = bytes([0, 0, 8, 3]) + struct.pack(">III", 2**32 - 1, 28, 28)
    yield "idx: 2^32 images", functools.partial(idx, images=gzip.compress(big))
    yield "idx: sides of 2^32", functools.partial(idx, images=gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12))
    yield "idx: three gigabytes of zeros", functools.partial(lambda folder: idx(folder, _gzipped(big, size)))
    yield "idx: no gzip", functools.partial(idx, images=b"\x1f\x8b" + bytes(100))


def _saved(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _gzipped(start: bytes, zeros: int) -> bytes:
    stream = io.BytesIO()
    with gzip.open(stream, "wb", 9) as file:
        file.write(start)
        for _ in range(zeros // 2**24):
            file.write(bytes(2**24))
    return stream.getvalue()


def _names() -> Iterator[tuple[str, Case]]:
    def folders(folder: Path, name: str, broken: bool = False) -> list[str]:
        for split in ("train", "val"):
            for kind in (name, "dog"):
                _picture(folder / split / kind / "a.png")
            if broken:
                (folder / split / "dog" / f"{name}.png").write_bytes(b"broken")
        return _fit(folder, "ImageFolder", "--data.image_size=32", "--data.batch_size=4")

    for name in ("escape", "lines", "html", "mathtext", "markup", "format", "rtl"):
        # A file system takes no more than 255 bytes of any but / and NUL.
        yield f"folders: a class, {name}", functools.partial(folders, name=NAMES[name].replace("/", "_"))
        yield (
            f"folders: a broken file, {name}",
            functools.partial(folders, name=NAMES[name].replace("/", "_"), broken=True),
        )

    def special(folder: Path, make: Callable[[Path], None], *words: str) -> list[str]:
        command = folders(folder, "cat")
        make(folder / "train" / "cat" / "evil.png")
        return [*command, *words]

    special_files: dict[str, Callable[[Path], None]] = {
        "a link to /etc/passwd": lambda path: path.symlink_to("/etc/passwd"),
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to the folder above": lambda path: path.with_suffix("").symlink_to(
            path.parent.parent, target_is_directory=True
        ),
        "a link to nothing": lambda path: path.symlink_to(path.parent / "nothing.png"),
        "a pipe": lambda path: os.mkfifo(path),
    }
    for name, make in special_files.items():
        yield f"folders: {name}", functools.partial(special, make=make)
        yield (
            f"folders, skipped: {name}",
            functools.partial(lambda folder, make: special(folder, make, "--data.on_bad_image=skip"), make=make),
        )
    yield (
        "folders: a pipe, links followed",
        functools.partial(lambda folder: special(folder, special_files["a pipe"], "--data.follow_links=true")),
    )

    def classes(folder: Path, text: str) -> list[str]:
        (folder / "classes.txt").write_bytes(_text_bytes(text))
        for split in ("train", "val"):
            _picture(folder / split / "images" / "a.png")
            (folder / split / "masks").mkdir(parents=True)
            mask = np.zeros((32, 40), np.uint8)
            mask[:16] = 1
            Image.fromarray(mask).save(folder / split / "masks" / "a.png")
        size = ("--data.classes=classes.txt", "--data.crop_size=[32,32]", "--data.batch_size=1")
        return _fit(folder, "MaskFolder", *size)

    yield "masks: names with escapes", functools.partial(classes, text=f"{ESCAPE}\n<b>\n$\\frac$")
    yield "masks: a million names", functools.partial(classes, text="\n".join(f"c{i}" for i in range(1_000_000)))
    yield "masks: a name of ten megabytes", functools.partial(classes, text="a\n" + "c" * 10_000_000)
    yield "masks: no text", functools.partial(classes, text="\ud800")
