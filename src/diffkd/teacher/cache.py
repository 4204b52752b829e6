"""A disk cache of a teacher's features by sample, for many epochs and students."""

import json
import math
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffkd.files.config import differences
from diffkd.files.weights import write_text, write_whole

Storage = Literal["float16", "float32"]
_TYPES: dict[str, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}
_FORMAT = 1


class TeacherCache:
    """Stores the outputs of a teacher's layers for each sample, and for each view of it, in memory-mapped files.

    A folder holds `cache.json`, which identifies teacher and data, one file per layer, and one validity file per rank.
    Entries become valid only by :meth:`commit`, which flushes the features first: after a crash, uncommitted entries
    are computed again. All disk space is allocated when the cache is created, so that the disk cannot run full later.
    Processes of one machine may share a folder.

    Args:
        folder: of the cache; created if missing.
        identity: plain values that determine the features: teacher, data, image processing. A cache with other values
            is refused.
        shapes: of one sample's output by layer. A cache with more layers can be read, but not extended.
        samples: number of samples.
        views: number of views of each sample, such as differently augmented epochs.
        storage: dtype on disk.
        rank: of this process; part of the name of its validity file.
        create: create the cache if there is none; False: it must exist.

    Raises:
        FileNotFoundError: if there is none and `create` is False.
        ValueError: if the cache has another identity (the message names the difference), or values are out of range.
        OSError: if the disk has too little space; no files are left then.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        identity: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
        samples: int,
        views: int = 1,
        storage: Storage = "float16",
        rank: int = 0,
        create: bool = True,
    ) -> None:
        if storage not in _TYPES:
            raise ValueError(f"features are stored as float16 or float32, got {storage!r}")
        if samples < 1 or views < 1 or not shapes:
            raise ValueError(f"a cache needs samples, views and layers, got {samples}, {views} and {list(shapes)}")
        self.folder, self.samples, self.views, self.rank = Path(folder), samples, views, rank
        self.shapes = {name: tuple(int(side) for side in shape) for name, shape in shapes.items()}
        self.dtype = _TYPES[storage]
        card = {
            "format": _FORMAT,
            "samples": samples,
            "views": views,
            "storage": storage,
            "identity": json.loads(json.dumps(identity)),
            "layers": {name: list(shape) for name, shape in self.shapes.items()},
        }
        path = self.folder / "cache.json"
        if not path.is_file():
            if not create:
                raise FileNotFoundError(f"there is no teacher cache in {self.folder}")
            self._create(card)
        self._files = _check(self.folder, _stored(path), card)
        self._maps = {name: self._map(name) for name in self.shapes}
        self.valid = torch.zeros(views * samples, dtype=torch.uint8)
        self._own = self.valid.clone()
        self.refresh()

    @property
    def size(self) -> int:
        """Bytes that the features of these layers take."""
        return sum(self._bytes(shape) for shape in self.shapes.values())

    def known(self, indices: Tensor, view: int = 0) -> Tensor:
        """Return for each sample of `indices` (B,) whether its features of a view are cached, (B,) bool on the CPU."""
        return self.valid[self._rows(indices, view)] != 0

    def read(self, indices: Tensor, view: int = 0) -> dict[str, Tensor]:
        """Return the features of samples (B,) by layer, (B, ...) float32 on the device of `indices`.

        Raises:
            KeyError: if some of them are not cached.
        """
        rows = self._rows(indices, view)
        if not bool(self.valid[rows].all()):
            raise KeyError(f"{int((self.valid[rows] == 0).sum())} of these samples are not in {self.folder}")
        return {name: table[rows].float().to(indices.device) for name, (table, _) in self._maps.items()}

    def write(self, indices: Tensor, features: Mapping[str, Tensor], view: int = 0) -> None:
        """Write the features of samples (B,) by layer, (B, ...).

        Raises:
            ValueError: if shapes are not those of the cache, or values do not fit into the type on disk.
        """
        rows = self._rows(indices, view)
        if len(self._files) > len(self._maps):
            return  # the other layers' entries would be missing
        for name, (table, _) in self._maps.items():
            feature = features[name]
            if tuple(feature.shape) != (len(rows), *self.shapes[name]):
                raise ValueError(
                    f"layer '{name}' gave {tuple(feature.shape)} for {len(rows)} samples, the cache holds "
                    f"{self.shapes[name]} of each: features can only be kept if all samples have one size"
                )
            narrow = feature.detach().to("cpu", self.dtype)
            if not bool(narrow.isfinite().all()) and bool(feature.isfinite().all()):
                raise ValueError(
                    f"layer '{name}' reaches {float(feature.abs().max()):.3g}, more than {self.dtype} holds; store "
                    "the teacher's features as float32"
                )
            table[rows] = narrow
        self.valid[rows] = 1
        self._own[rows] = 1

    def commit(self) -> None:
        """Flush all features to the disk, then mark them as valid.

        Raises:
            OSError: if that fails; entries marked before stay valid.
        """
        if not bool(self._own.any()):
            return
        for _, mapped in self._maps.values():
            mapped.flush()
        path = self.folder / f"valid-{self.rank}.bin"
        together = self._own | self._marks(path)  # another run may have filled other entries meanwhile
        write_whole(path, lambda file: file.write_bytes(bytes(together.numpy().data)))

    def refresh(self) -> None:
        """Read the entries that other ranks have marked as valid."""
        for path in sorted(self.folder.glob("valid-*.bin")):
            self.valid |= self._marks(path)

    def _marks(self, path: Path) -> Tensor:
        if not path.is_file():
            return torch.zeros_like(self.valid)
        content = path.read_bytes()
        if len(content) != len(self.valid):
            raise ValueError(f"{path} has {len(content)} bytes instead of {len(self.valid)}; delete {self.folder}")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def _rows(self, indices: Tensor, view: int) -> Tensor:
        if not 0 <= view < self.views:
            raise ValueError(f"there is no view {view} among {self.views}")
        rows = indices.detach().to("cpu", torch.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.samples:
            raise ValueError(f"samples {int(rows.min())} to {int(rows.max())} are not all in 0 to {self.samples - 1}")
        return rows + view * self.samples

    def _bytes(self, shape: Sequence[int]) -> int:
        return self.views * self.samples * math.prod(shape) * self.dtype.itemsize

    def _map(self, name: str) -> tuple[Tensor, mmap.mmap]:
        with (self.folder / self._files[name]).open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        shape = self.shapes[name]
        if len(mapped) != self._bytes(shape):
            raise ValueError(f"{self.folder / self._files[name]} was cut to {len(mapped)} bytes; delete {self.folder}")
        return torch.frombuffer(mapped, dtype=self.dtype).reshape(self.views * self.samples, *shape), mapped

    def _create(self, card: Mapping[str, Any]) -> None:
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} holds something else than a teacher cache; give an empty folder")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self.folder)
        free = shutil.disk_usage(self.folder.parent).free
        if self.size > free:
            raise OSError(
                f"the teacher cache {self.folder} takes {self.size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
                "store float16, cache fewer views, or give another folder"
            )
        # Written to a temporary folder, which is renamed when complete.
        parts = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f".{self.folder.name}."))
        try:
            for number, shape in enumerate(self.shapes.values()):
                _allocate(parts / f"layer-{number}.bin", self._bytes(shape))
            write_text(parts / "cache.json", json.dumps(card, indent=2) + "\n")
            parts.chmod(0o755)
            if self.folder.is_dir():
                self.folder.rmdir()
            parts.replace(self.folder)
        except OSError as error:
            shutil.rmtree(parts, ignore_errors=True)
            if (self.folder / "cache.json").is_file():
                return  # another run has created it meanwhile; it is checked like any other
            raise OSError(f"could not make the teacher cache {self.folder} ({error}); nothing is left there") from error


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders of processes that were killed while they created this cache: it may be large."""
    for parts in folder.parent.glob(f".{folder.name}.{'?' * 8}"):
        with suppress(OSError):
            if parts.is_dir() and time.time() - parts.stat().st_mtime > _ABANDONED:
                shutil.rmtree(parts)


_ABANDONED = 3600  # seconds after which no process creates a cache any more


def _allocate(path: Path, size: int) -> None:
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        block = bytes(2**20)  # actual zeros: a sparse file could let the disk run full later
        for start in range(0, size, len(block)):
            file.write(block[: size - start])


def _stored(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); delete {path.parent}") from error
    if not isinstance(content, dict) or not isinstance(content.get("layers", {}), dict):
        raise ValueError(f"{path} describes no teacher cache; delete {path.parent}")
    return content


def _check(folder: Path, stored: Any, wanted: Mapping[str, Any]) -> dict[str, str]:
    """Return the file of each layer; raise ValueError with the difference if the identity differs."""
    layers = dict(stored.get("layers", {}))
    if stored.get("format") != _FORMAT:
        raise ValueError(f"{folder} is a teacher cache of another version; give another folder")
    found = differences(
        {key: value for key, value in stored.items() if key != "layers"},
        {key: value for key, value in wanted.items() if key != "layers"},
    )
    for name, shape in wanted["layers"].items():
        if layers.get(name) != shape:
            there = f"{layers[name]} there" if name in layers else f"not there, only {', '.join(layers)}"
            found.append(f"layer '{name}' is {there}, {shape} here")
    if found:
        text = "; ".join(one.removeprefix("identity.") for one in found)
        raise ValueError(f"the teacher cache {folder} is of another training: {text}; give another folder")
    return {name: f"layer-{number}.bin" for number, name in enumerate(layers)}
