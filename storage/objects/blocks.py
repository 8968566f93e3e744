"""Digests of the blocks of a long object, so that a part of it can be checked without the rest."""

from collections.abc import Iterator
from typing import Final

import xxhash

BLOCK_BYTES: Final = 1 << 20
DIGEST_BYTES: Final = 16


class BlockDigests:
    """Of a data set as it comes: xxh3-128 of each `BLOCK_BYTES`, the last of which may be shorter."""

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._block = xxhash.xxh3_128()
        self._room = BLOCK_BYTES

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """What comes next."""
        view = memoryview(data)
        while view:
            part = view[: self._room]
            self._block.update(part)
            self._room -= len(part)
            view = view[len(part) :]
            if not self._room:
                self._done.append(self._block.digest())
                self._block, self._room = xxhash.xxh3_128(), BLOCK_BYTES

    def digests(self) -> bytes:
        """All of them, one behind the other."""
        return b"".join(self._done) + (self._block.digest() if self._room < BLOCK_BYTES else b"")


def are_good(blocks: bytes, at: int, data: bytes) -> bool:
    """`data`, which begins at byte `at` of a data set, the start of a block, is what the digests say. A last block may
    be cut short only where the data set ends: `data` has whole blocks, or all to the end."""
    first = at // BLOCK_BYTES * DIGEST_BYTES
    wanted = blocks[first : first + -(-len(data) // BLOCK_BYTES) * DIGEST_BYTES]
    return bool(data) and wanted == b"".join(_digests(data))


def _digests(data: bytes) -> Iterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(data), BLOCK_BYTES):
        yield xxhash.xxh3_128_digest(view[start : start + BLOCK_BYTES])
