"""Images inside uncompressed tar archives, as WebDataset keeps them, each read at its place without unpacking."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

SHARD = ".tar"
_LARGEST = 1 << 30  # bytes of one image file; larger ones are no image, or do not fit in memory


class TarMember(str):
    """The path of a file inside a tar archive, `ARCHIVE/NAME`, which knows where its content lies.

    Args:
        archive: path of the archive.
        name: of the file in it.
        offset: of its content in the archive, in bytes.
        size: of its content, in bytes.
    """

    __slots__ = ("archive", "name", "offset", "size")

    archive: str
    name: str
    offset: int
    size: int

    def __new__(cls, archive: str, name: str, offset: int, size: int) -> "TarMember":
        """Return the path."""
        made = super().__new__(cls, f"{archive}/{name}")
        made.archive, made.name, made.offset, made.size = archive, name, offset, size
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Tell `pickle` the arguments; paths go to worker processes."""
        return TarMember, (self.archive, self.name, self.offset, self.size)

    def read(self) -> bytes:
        """Return the content of the file."""
        with Path(self.archive).open("rb") as archive:  # opened anew: processes would share its position
            archive.seek(self.offset)
            return archive.read(self.size)


def members_of(archive: str, extensions: frozenset[str], others: Counter[str] | None = None) -> list[TarMember]:
    """Return the files with certain extensions in an uncompressed tar archive, in its order.

    Nothing is unpacked. Links, devices and hidden files are not read.

    Args:
        archive: path of the archive.
        extensions: in lower case, with the dot.
        others: counter that receives the extensions of the other files.

    Raises:
        ValueError: if it is no uncompressed tar archive or is cut off, a name in it leads out of it, or an image is
            larger than 1 GiB.
    """
    end = Path(archive).stat().st_size
    found = []
    for member in _entries(archive):
        name = PurePosixPath(member.name.lstrip("/"))
        if ".." in name.parts:
            raise ValueError(f"{archive}: {member.name!r} leads out of the archive; pack it again without.")
        if any(part.startswith(".") for part in name.parts) or member.isdir():
            continue
        extension = os.path.splitext(name.name)[1].lower()  # noqa: PTH122 - as for folders
        if not member.isreg() or member.issparse() or extension not in extensions:
            if others is not None:
                others[extension or name.name] += 1
            continue
        if member.size > _LARGEST:
            raise ValueError(
                f"{archive}: {member.name!r} has {member.size} bytes, more than any image; pack it again without."
            )
        if member.offset_data + member.size > end:
            raise ValueError(f"{archive}: it is cut off in {member.name!r}; copy or download it again.")
        found.append(TarMember(archive, str(name), member.offset_data, member.size))
    return found


def _entries(archive: str) -> Iterator[tarfile.TarInfo]:
    """Yield what an archive lists; raise ValueError where tarfile fails, stops early, or would never stop."""
    try:
        with tarfile.open(archive, "r:") as opened:
            reached = -1
            while (member := opened.next()) is not None:
                if opened.offset <= reached or member.size < 0:
                    raise tarfile.ReadError(f"an entry at byte {reached} has no size")
                reached = opened.offset
                opened.members = []  # type: ignore[attr-defined]  # would grow with each file that is passed
                yield member
            with Path(archive).open("rb") as file:  # at a damaged header the list ends as at its last one
                file.seek(opened.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError(f"there is no header at byte {opened.offset}")
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{archive}: no whole, uncompressed tar archive ({error}); unpack a compressed one by gunzip or unzstd, "
            "since images are read from it in any order, and download a damaged one again."
        ) from error
