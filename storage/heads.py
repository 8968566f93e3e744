"""Kept heads: what can be said of each instance without its file. Made from the copies, so they may be lost; nothing of
them is replicated.

All heads of a series are nearly the same: each is compressed with the first one as dictionary, which is kept once.
"""

import shutil
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from storage.state.kv import DATA_FILE, CatalogueDamaged, LmdbKv, LmdbReader, Transaction
from storage.state.model import Put

FOLDER: Final = "heads"  # beside the catalogue's
FORMAT: Final = b"1"
TABLES: Final = ("meta", "heads", "firsts")  # facts; number of an instance -> row; series -> what it begins with
MAP_BYTES: Final = 64 << 20
LEVEL: Final = 6  # of compression
DIGEST_BYTES: Final = 8
WINDOW: Final = 32 << 10  # of the dictionary no more is looked at
KEY_BYTES: Final = 8


class _Row(msgspec.Struct, frozen=True, array_like=True):
    digest: bytes
    left_out: tuple[int, ...]
    data: bytes


class _First(msgspec.Struct, frozen=True, array_like=True):
    study: str
    series: str
    data: bytes


class Kept(msgspec.Struct, frozen=True):
    """`left_out`: tags that aren't in `data`."""

    data: bytes
    left_out: tuple[int, ...]


_row, _first = msgspec.msgpack.Decoder(_Row).decode, msgspec.msgpack.Decoder(_First).decode
_encode = msgspec.msgpack.Encoder().encode


def key_of(seq: int) -> bytes:
    return seq.to_bytes(KEY_BYTES, "big")


def _series_key(put: Put) -> bytes:
    return xxhash.xxh3_128_digest("\0".join((put.study, put.series, put.transfer_syntax)).encode())


class Heads:
    """Reads them. `seq` is an instance's number; a head that was made of other bytes isn't its."""

    def __init__(self, kv: LmdbReader | LmdbKv, number: int = 0) -> None:
        """`number`: of the file, which another one has if they were begun anew."""
        self._kv, self.number = kv, number

    def get(self, seq: int, put: Put) -> Kept | None:
        with self._kv.read() as txn:
            raw = txn.get("heads", key_of(seq))
            row = _row(raw) if raw is not None else None
            if row is None or row.digest != put.digest[:DIGEST_BYTES]:
                return None
            first = txn.get("firsts", _series_key(put))
        if not row.data:
            return Kept(b"", row.left_out)
        if first is None:
            return None
        try:
            return Kept(_unpacked(row.data, zlib.decompress(_first(first).data)), row.left_out)
        except zlib.error:  # the first of its series was another one
            return None

    @property
    def count(self) -> int:
        with self._kv.read() as txn:
            return txn.count("heads")

    def close(self) -> None:
        self._kv.close()


class Keeper(Heads):
    """Writes them; one process."""

    def __init__(self, folder: Path) -> None:
        """What isn't of this version, or is damaged, is begun anew. Raises OSError."""
        self._folder = folder
        try:
            kv = LmdbKv(folder, MAP_BYTES, TABLES)
        except CatalogueDamaged:
            shutil.rmtree(folder, ignore_errors=True)
            kv = LmdbKv(folder, MAP_BYTES, TABLES)
        super().__init__(kv)
        self._kv: LmdbKv = kv
        with kv.read() as txn:
            is_ours = txn.get("meta", b"format") == FORMAT
        if not is_ours:
            kv.close()
            shutil.rmtree(folder, ignore_errors=True)
            self._kv = LmdbKv(folder, MAP_BYTES, TABLES)
            self._kv.update(lambda txn: txn.put("meta", b"format", FORMAT))

    @property
    def last(self) -> int:
        """The newest instance that has one; 0: none."""
        with self._kv.read() as txn:
            key = txn.last_key("heads")
        return int.from_bytes(key, "big") if key else 0

    def digests(self, start: int, limit: int) -> list[tuple[int, bytes]]:
        """(number, beginning of the digest) of some instances that have one."""
        with self._kv.read() as txn:
            rows = islice(txn.scan("heads", key_of(start)), limit)
            return [(int.from_bytes(key, "big"), _row(value).digest) for key, value in rows]

    def series(self, start: bytes, limit: int) -> list[tuple[bytes, str, str]]:
        """(key, study, series) of some of which the first is kept."""
        with self._kv.read() as txn:
            rows = islice(txn.scan("firsts", start), limit)
            return [(key, (one := _first(value)).study, one.series) for key, value in rows]

    def change(self, kept: Sequence[tuple[int, Put, Kept]], gone: Sequence[int], series: Sequence[bytes] = ()) -> None:
        """Keep some, and forget some instances, and series by their keys; durable as a whole."""
        self._kv.update(lambda txn: self._change(txn, kept, gone, series))

    def _change(
        self, txn: Transaction, kept: Sequence[tuple[int, Put, Kept]], gone: Sequence[int], series: Sequence[bytes]
    ) -> None:
        for seq in gone:
            txn.delete("heads", key_of(seq))
        for key in series:
            txn.delete("firsts", key)
        firsts: dict[bytes, bytes] = {}
        for seq, put, head in kept:
            key = _series_key(put)
            if head.data and key not in firsts:
                raw = txn.get("firsts", key)
                if raw is None:
                    txn.put("firsts", key, _encode(_First(put.study, put.series, zlib.compress(head.data, LEVEL))))
                    firsts[key] = head.data
                else:
                    firsts[key] = zlib.decompress(_first(raw).data)
            data = _packed(head.data, firsts[key]) if head.data else b""
            row = _Row(put.digest[:DIGEST_BYTES], head.left_out, data)
            txn.append("heads", key_of(seq), _encode(row))

    @property
    def size_bytes(self) -> int:
        """What they take on the disk."""
        return self._kv.size_bytes


def _packed(data: bytes, first: bytes) -> bytes:
    packer = zlib.compressobj(LEVEL, zdict=first[-WINDOW:])
    return packer.compress(data) + packer.flush()


def _unpacked(data: bytes, first: bytes) -> bytes:
    """Raises zlib.error also for another dictionary than it was packed with."""
    return zlib.decompressobj(zdict=first[-WINDOW:]).decompress(data)


def opened_again(before: Heads | None, folder: Path) -> Heads | None:
    """For a process that reads what another one keeps: `before`, or what has taken its place; None if there is none."""
    try:
        number = (folder / DATA_FILE).stat().st_ino
        if before is not None and before.number == number:
            return before
        if before is not None:
            before.close()
        return Heads(LmdbReader(folder, TABLES), number)
    except OSError:
        return None
