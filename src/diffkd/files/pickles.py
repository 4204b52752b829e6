"""Reading of PyTorch's pickle files as data: tensors and plain values are rebuilt, other objects are skipped and named.

`torch.load(weights_only=True)` rejects a whole file because of one unknown object, such as the `argparse.Namespace`
beside the weights. Here no name in a file is imported or called: known names map to the few functions of this module
that build tensors, all others to :class:`Skipped`.
"""

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

# Limit of the number of opcodes, each of which can create an object of up to 216 bytes, besides its own text.
_MOST_OBJECTS = 2**24
# Limit of the pickle's size, such as of the texts and logs in it. Tensor data are stored outside of it.
_LARGEST_PICKLE = 2**30
_LARGEST_KEY = 2**64  # of integers as keys
_LONGEST_NAME = 1000  # characters of keys, and of the names of classes
# A view may repeat its storage, as from `expand`, up to this many bytes.
_LARGEST_REPEAT = 2**24
_TOO_MANY = "it holds more objects than a file of weights does"
_LONGEST_PATH = 80  # characters of a class's name in messages
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Modules whose functions a malicious file would call; no file of weights refers to them.
_CODE = re.compile(
    r"(os|posix|nt|subprocess|sys|shutil|socket|runpy|ctypes|importlib|pty|code|codeop|commands|webbrowser|marshal|"
    r"operator|_?pickle|asyncio|pip|pydoc|timeit|c?profile|pdb|bdb)(\..*)?",
    re.IGNORECASE,
)
_CALLS = re.compile("eval|exec|execfile|compile|open|setattr|delattr|__import__|input|breakpoint|apply|globals|vars")


class CodeError(ValueError):
    """A file names a function that unpickling would call."""


class Skipped:
    """Placeholder for an unknown class or function, for what it returns, and for its attributes.

    Args:
        path: dotted name of the class, "package.module.Name".
    """

    __slots__ = ("path",)

    def __init__(self, path: str = "") -> None:
        self.path = path


def looks_like_pickle(path: Path) -> bool:
    """Whether a file starts like one of `torch.save` or pickle."""
    with path.open("rb") as file:
        start = file.read(4)
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and len(start) > 1 and start[1] <= 5)


def read_pickle(path: Path) -> Any:
    """Return the content of a file of `torch.save`, in the format since PyTorch 1.6 or the one before.

    Args:
        path: the file.

    Returns:
        The saved mappings, lists, numbers, strings and tensors (on the CPU), with a :class:`Skipped` for every other
        object.

    Raises:
        CodeError: if unpickling would call a function such as `os.system`.
        ValueError: if it is a TorchScript program, or its zip entries are compressed.
        Exception: of any type, if the file is damaged.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            return _from_zip(path, archive, file)
    with path.open("rb") as file:
        return _from_stream(file)


def _from_zip(path: Path, archive: zipfile.ZipFile, file: BinaryIO) -> Any:
    entries = archive.infolist()
    names = {entry.filename: entry for entry in entries}
    main = next((name for name in names if name.count("/") <= 1 and name.rpartition("/")[2] == "data.pkl"), None)
    if main is None:
        raise ValueError(f"it is a zip archive {_kind_of_archive(list(names))}")
    folder = main.removesuffix("data.pkl")
    if f"{folder}constants.pkl" in names or any(name.startswith(f"{folder}code/") for name in names):
        raise ValueError(
            "it is a TorchScript program; load it with torch.jit.load where you trust it, and save its state_dict()"
        )
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its parts are compressed or overlap, as PyTorch never writes them")
    order = names.get(f"{folder}byteorder")
    if order is not None and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian; save it again on the usual kind of machine")
    if names[main].file_size > _LARGEST_PICKLE:
        raise ValueError(f"it holds more than {_LARGEST_PICKLE // 2**20} MiB of objects beside its tensors")
    known: dict[str, _Storage] = {}

    def load(saved: Any) -> "_Storage":
        _check_reference(saved)
        _, dtype, key, *_ = saved
        if key not in known:
            content = bytearray(archive.read(f"{folder}data/{key}"))
            known[key] = _Storage(content, dtype if isinstance(dtype, torch.dtype) else None)
        return known[key]

    return _Reader(io.BytesIO(archive.read(main)), load, names[main].file_size).load()


def _kind_of_archive(names: list[str]) -> str:
    """Return what an archive is that has not been written by `torch.save`, by the names in it."""
    inside = next((name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".safetensors"))), None)
    if any(name.endswith("archive_format") or "/models/" in name for name in names):
        return "of torch.export, a program: take the weights that it was made from"
    if any(name.endswith("weights.h5") for name in names):
        return "of Keras: convert it to safetensors with the library that it comes from"
    if any(name.endswith(".npy") for name in names):
        return "of arrays of NumPy: save them by name as safetensors"
    if inside is not None:
        return f"around other files, such as {re.sub(r'[^ -~]', '?', inside)[:80]}: unpack it first"
    return "without data.pkl, as torch.save writes it"


def _from_stream(file: BinaryIO) -> Any:
    """Read the format before PyTorch 1.6: five pickles, then the storages, each preceded by its length."""
    storages: dict[str, _Storage] = {}

    def load(saved: Any) -> "_Storage":
        _check_reference(saved)
        _, dtype, key, _, _, *view = saved
        if key not in storages:
            storages[key] = _Storage(None, dtype if isinstance(dtype, torch.dtype) else None)
        if view and view[0] is not None:
            part, offset, length = view[0]
            _check_reference(("storage", dtype, part))
            return storages.setdefault(part, _Part(storages[key], int(offset), int(length)))
        return storages[key]

    size = min(_remaining_bytes(file), _LARGEST_PICKLE)
    reader = _Reader(_Limited(file, size), load, size)
    first = reader.load()
    if first != _LEGACY_MAGIC:
        return first  # a plain pickle without tensors
    reader.load()  # the format version
    system = reader.load()
    if isinstance(system, dict) and not system.get("little_endian", True):
        raise ValueError("its numbers are big-endian; save it again on the usual kind of machine")
    content = reader.load()
    keys = reader.load()
    for key in keys:
        _check_reference(("storage", None, key))
        (count,) = struct.unpack("<q", file.read(8))
        width = _width(storages[key].dtype)
        left = _remaining_bytes(file)
        if not 0 <= count * width <= left:
            raise ValueError("it ends before its tensors do")
        storages[key].content = bytearray(file.read(count * width))
    return _built(content)


def _check_reference(saved: Any) -> None:
    """Raise ValueError if a reference is none to a storage: a tuple of "storage", its type, its name and more."""
    whole = isinstance(saved, tuple) and 3 <= len(saved) <= 8
    if not whole or saved[0] != "storage" or not isinstance(saved[2], str):
        raise ValueError("it refers to data outside of it that are no tensor")


def _remaining_bytes(file: BinaryIO) -> int:
    here = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(here)
    return end - here


def _width(dtype: torch.dtype | None) -> int:
    return 1 if dtype is None else torch.empty((), dtype=dtype).element_size()


class _Storage:
    """A tensor storage; in the older format its bytes follow the tensors."""

    def __init__(self, content: bytearray | None, dtype: torch.dtype | None) -> None:
        self.content, self.dtype = content, dtype

    def numbers(self, dtype: torch.dtype | None) -> Tensor:
        """Return all elements, (n,)."""
        dtype = dtype or self.dtype or torch.uint8
        if not self.content:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.content, dtype=torch.uint8).view(dtype)


class _Part(_Storage):
    """A range of another storage."""

    def __init__(self, whole: _Storage, offset: int, length: int) -> None:
        super().__init__(None, whole.dtype)
        self.whole, self.offset, self.length = whole, offset, length

    def numbers(self, dtype: torch.dtype | None) -> Tensor:
        """Return the elements of the range, (length,)."""
        return self.whole.numbers(dtype).narrow(0, self.offset, self.length)


class _View:
    """A tensor that is built after its storage has been read."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> None:
        if not isinstance(storage, _Storage):
            raise ValueError("it holds a tensor without a storage")
        self.storage, self.offset, self.size, self.stride, self.dtype = storage, offset, size, stride, dtype

    def tensor(self) -> Tensor:
        """Return the tensor.

        Raises:
            ValueError: if it would expand a small storage to a huge tensor.
        """
        numbers = self.storage.numbers(self.dtype)
        view = numbers.as_strided(tuple(self.size), tuple(self.stride), int(self.offset))
        if view.numel() > max(numbers.numel(), _LARGEST_REPEAT // numbers.element_size()):
            raise ValueError("it holds a tensor that is larger than its numbers")
        return view


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    view = _View(storage, offset, size, stride)
    return view.tensor() if storage.content is not None else view


def _tensor_of_type(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    view = _View(storage, offset, size, stride, dtype if isinstance(dtype, torch.dtype) else None)
    return view.tensor() if storage.content is not None else view


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _rebuilt(function: Any, kind: Any, arguments: Any, state: Any = None) -> Any:
    if function not in (_tensor, _tensor_of_type, _parameter):
        return function if isinstance(function, Skipped) else Skipped()
    return function(*arguments)


def _attribute(owner: Any, name: Any, *default: Any) -> Skipped:
    """Stand in for getattr, by which pickle refers to methods and to nested classes: only placeholders have any."""
    if not isinstance(owner, Skipped) or not isinstance(name, str):
        raise CodeError("builtins.getattr")
    return Skipped(_short_path(f"{owner.path}.{name[:_LONGEST_PATH]}"))


def _short_path(path: str) -> str:
    return re.sub(r"[^\w.]", "?", path)[:_LONGEST_PATH]


def _mapping(*arguments: Any) -> dict[Any, Any]:
    pairs = next((one for one in arguments if isinstance(one, (list, tuple, dict))), ())
    items = list(pairs.items()) if isinstance(pairs, dict) else pairs
    return {key: value for key, value in items if _is_key(key)}


def _members(items: Any = (), *rest: Any) -> set[Any]:
    return {one for one in items if _is_key(one)}


def _is_key(value: Any) -> bool:
    """Whether a value may be a key: a few bytes can make a tuple whose hash takes for ever, and others are no names."""
    if type(value) is int:
        return -_LARGEST_KEY < value < _LARGEST_KEY
    if type(value) in (str, bytes):
        return len(value) <= _LONGEST_NAME
    return value is None or type(value) in (bool, float, Skipped)


def _text(text: Any, encoding: Any = "latin1", *rest: Any) -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding in ("latin1", "latin-1") else b""


_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuilt,
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): _mapping,
    ("collections", "Counter"): _mapping,
    ("torch", "Size"): lambda sizes=(), *rest: tuple(sizes),
    ("_codecs", "encode"): _text,
    ("builtins", "getattr"): _attribute,
    ("__builtin__", "getattr"): _attribute,
    **{(module, name): _members for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class _Limited:
    """A stream that limits the number of bytes read."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self.file, self.left = file, limit

    def read(self, count: int = -1) -> bytes:
        """Read `count` bytes."""
        return self._taken(self.file.read(min(count, self.left + 1) if count >= 0 else self.left + 1))

    def readline(self) -> bytes:
        """Read to the end of the line."""
        return self._taken(self.file.readline(self.left + 1))

    def _taken(self, read: bytes) -> bytes:
        self.left -= len(read)
        if self.left < 0:
            raise ValueError(_TOO_MANY)
        return read


_Unpickler: Any = pickle._Unpickler


def _counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return the function of an opcode that counts its calls first."""

    def counting(reader: Any) -> None:
        reader._objects -= 1
        if reader._objects < 0:
            raise ValueError(_TOO_MANY)
        load(reader)

    return counting


class _Reader(_Unpickler):  # type: ignore[misc]
    """An unpickler that does not import or call anything named in the file.

    It uses the pure-Python unpickler, since the C one allocates memory for any number of entries that a file claims.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def __init__(self, file: Any, load: Callable[[Any], _Storage], size: int) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._load_storage = load
        self._kinds: dict[tuple[str, str], Skipped] = {}
        self._objects = _MOST_OBJECTS
        # What is built from the file's lists and texts is not larger than they are, unless they are used repeatedly.
        self._budget = max(_MOST_OBJECTS, size)

    def load(self) -> Any:
        """Return the next object of the file; the limits are of all together."""
        self.memo: dict[int, Any] = {}
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a class or function name."""
        if len(module) + len(name) > _LONGEST_NAME:
            raise ValueError(f"it names a class by more than {_LONGEST_NAME} characters")
        if (module, name) in _BUILDERS:
            return _BUILDERS[module, name]
        if module == "torch" and isinstance(found := torch.__dict__.get(name), torch.dtype):
            return found
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
            return _STORAGES[name]
        path = _short_path(f"{module}.{name}")
        if _CODE.fullmatch(module) or (module in ("builtins", "__builtin__") and _CALLS.fullmatch(name)):
            raise CodeError(path)
        if (module, name) not in self._kinds:
            self._kinds[module, name] = Skipped(path)
        return self._kinds[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage with this persistent id."""
        return self._load_storage(pid)

    def get_extension(self, code: int) -> None:
        """Reject extension codes, which are registered per machine."""
        raise ValueError("it names an extension of pickle's registry")

    def _made(self, kind: Any, arguments: Any, options: Any = None) -> Any:
        if isinstance(kind, Skipped):
            return Skipped(kind.path)
        if kind not in _BUILDERS.values() or options:
            raise ValueError("it calls what is no class")
        # A few bytes can refer to a large list or text again, and build from it again and again.
        self._budget -= len(arguments)
        self._budget -= sum(len(one) for one in arguments if isinstance(one, (list, tuple, dict, set, str)))
        if self._budget < 0:
            raise ValueError(_TOO_MANY)
        return kind(*arguments)

    def _instantiate(self, kind: Any, arguments: Any) -> None:
        self.append(self._made(kind, arguments))

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], arguments)

    def _new(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack.pop()
        self.append(self._made(kind, arguments))

    def _new_with_options(self) -> None:
        self.stack.pop()
        self._new()

    def _build(self) -> None:
        self.stack.pop()

    def _append(self) -> None:
        value = self.stack.pop()
        if type(self.stack[-1]) is list:
            self.stack[-1].append(value)

    def _appends(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def _add_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is set:
            self.stack[-1].update(_members(items))

    def _set(self) -> None:
        self.append(frozenset(_members(self.pop_mark())))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        if type(self.stack[-1]) is dict and _is_key(key):
            self.stack[-1][key] = value

    def _set_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is dict:
            self.stack[-1].update(_mapping(list(zip(items[::2], items[1::2], strict=True))))

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append(_mapping(list(zip(items[::2], items[1::2], strict=True))))

    def _frame(self) -> None:
        self.read(8)  # the length of a part, which need not be read as a whole

    def _refused(self) -> None:
        raise ValueError("it holds raw bytes, which are no weights")

    for _code, _load in (
        (pickle.REDUCE, _reduce),
        (pickle.NEWOBJ, _new),
        (pickle.NEWOBJ_EX, _new_with_options),
        (pickle.BUILD, _build),
        (pickle.APPEND, _append),
        (pickle.APPENDS, _appends),
        (pickle.ADDITEMS, _add_items),
        (pickle.SETITEM, _set_item),
        (pickle.SETITEMS, _set_items),
        (pickle.DICT, _dict),
        (pickle.FROZENSET, _set),
        (pickle.FRAME, _frame),
        (pickle.BYTEARRAY8, _refused),
        (pickle.NEXT_BUFFER, _refused),
        (pickle.READONLY_BUFFER, _refused),
    ):
        dispatch[_code[0]] = _load
    for _number in dispatch:
        dispatch[_number] = _counted(dispatch[_number])


def _built(content: Any) -> Any:
    """Build all views in nested mappings and sequences, up to the depth where weights can be."""
    done: dict[int, Any] = {}

    def build(value: Any, depth: int) -> Any:
        if isinstance(value, _View):
            if id(value) not in done:
                done[id(value)] = value.tensor()
            return done[id(value)]
        if depth and type(value) is dict:
            if id(value) not in done:
                done[id(value)] = {key: build(one, depth - 1) for key, one in value.items()}
            return done[id(value)]
        if depth and type(value) in (list, tuple):
            if id(value) not in done:
                done[id(value)] = [build(one, depth - 1) for one in value]
            return done[id(value)]
        return value

    return build(content, 8)
