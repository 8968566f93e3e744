"""Copies of the bytes of the share's files on one node, as who writes them sees them; `local.py` is this machine's."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import xxhash

from storage.objects.blocks import BLOCK_BYTES

GENERATION_BYTES: Final = 4


@dataclass(frozen=True)
class Capacity:
    """Of a file system, in bytes and inodes."""

    total: int
    free: int
    inodes: int
    inodes_free: int


class StoredFile(Protocol):
    """One copy, opened. All methods block, raise OSError, and may be called from any thread, one at a time."""

    @property
    def leaving(self) -> bool:
        """Nothing is put any more on the volume that it lies on."""
        ...

    def write(self, data: bytes, at: int, grows: int) -> None:
        """`grows`: by how many bytes it gets longer. Part of it may have been written if this fails."""
        ...

    def read(self, size: int, at: int) -> bytes:
        """As much as there is."""
        ...

    def found(self) -> tuple[int, int]:
        """Its length, and when it was written to last (ns)."""
        ...

    def ends_unwritten(self) -> bool:
        """Its length was set, and the last of it never written."""
        ...

    def truncate(self, size: int) -> None: ...
    def cut(self, size: int) -> None:
        """Leave nothing behind so many bytes."""
        ...

    def touch(self) -> None:
        """It is in the making, and no leftover."""
        ...

    def sync(self) -> None:
        """Make bytes, length and name durable. If it fails, nothing is known of them; it does if the name is gone."""
        ...

    def close(self) -> None:
        """Who works on it now isn't disturbed."""
        ...


class CopyStore(Protocol):
    """All methods block, and may be called from several threads."""

    space: str  # the name of the inode numbers

    @property
    def complete(self) -> bool:
        """All volumes are there: what isn't found is nowhere on this node."""
        ...

    def open(self, number: int, generation: str, *, named: bool) -> StoredFile | None:
        """None if no volume has it. `named`: its name is known to be durable. Raises OSError if that can't be said."""
        ...

    def create(self, number: int, generation: str) -> StoredFile:
        """Raises OSError (ENOSPC, EEXIST)."""
        ...

    def has(self, number: int, generation: str) -> bool:
        """Raises OSError if that can't be said."""
        ...

    def listing(self, part: int) -> list[tuple[int, str, float]]:
        """(number, generation, seconds since it was changed) of the copies in one of 256 folders. Raises OSError."""
        ...

    def remove(self, number: int, generation: str) -> None:
        """Raises OSError."""
        ...

    def capacity(self) -> Capacity:
        """Of all volumes that answer."""
        ...

    def close(self) -> None: ...


OpenStore = Callable[[], CopyStore]


def digest_of(file: StoredFile, block: int) -> bytes:
    """xxh3-128 of one block of `BLOCK_BYTES` of a copy, the last one shorter. Blocks; raises OSError."""
    return xxhash.xxh3_128_digest(file.read(BLOCK_BYTES, block * BLOCK_BYTES))


def new_generation() -> str:
    """Of a copy that nobody has."""
    return secrets.token_hex(GENERATION_BYTES)
