"""What keeps bytes under names: the least that is asked of whatever may hold copies, a local disk, a shared file system
or an object store. No path leaves it.

All methods block and are called from worker threads. They raise OSError; after EIO the caller takes the store out of
service.
"""

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import xxhash

from storage.state.model import Put

READ_BYTES: Final = 1 << 20


class Spooled(Protocol):
    """A new object in a volume's spool folder."""

    name: str

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None: ...
    def finish(self, digest: bytes = b"", *, sync: bool = True) -> None:
        """Make the bytes durable, if `sync`, and close. `digest`, of the data set, is kept with the file where it can
        be."""
        ...

    def discard(self) -> None: ...


class Reader(Protocol):
    """An open file of a volume."""

    def read(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


class BlobStore(Protocol):
    """One place for objects."""

    id: str

    def check(self) -> None:
        """Raises VolumeOffline or OSError unless it is there, ours and takes writes."""
        ...

    def free_bytes(self) -> int: ...
    def total_bytes(self) -> int: ...
    def create(self) -> Spooled: ...
    def open(self, name: str, at: int = 0) -> Reader:
        """An object, to be read from byte `at` on. Raises FileNotFoundError."""
        ...

    def size(self, name: str) -> int:
        """In bytes. Raises FileNotFoundError."""
        ...

    def remove(self, name: str) -> None:
        """Nothing is done where there is none."""
        ...

    def names(self) -> Iterator[str]:
        """Of every object, those that are in their place for good before those that aren't yet."""
        ...

    def sync_all(self) -> None:
        """Make everything durable that was done here."""
        ...

    def close(self) -> None:
        """Leave it to others: nothing of it is used any more."""
        ...


def digest_of(store: BlobStore, name: str, offset: int) -> tuple[bytes, int]:
    """(xxh3-128 of what follows `offset`, length of the file). Raises OSError."""
    digest = xxhash.xxh3_128()
    length = 0
    file = store.open(name)
    try:
        length += len(file.read(offset))
        while block := file.read(READ_BYTES):
            digest.update(block)
            length += len(block)
    finally:
        file.close()
    return digest.digest(), length


def holds(store: BlobStore, name: str, put: Put) -> bool:
    """The file is the one that the record describes, by digest and length. Raises OSError."""
    return digest_of(store, name, put.offset) == (put.digest, put.length)
