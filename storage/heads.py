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

from storage.objects.blocks import are_good
from storage.state.kv import DATA_FILE, CatalogueDamaged, LmdbKv, LmdbReader, Transaction
from storage.state.model import Kept, Location, Put

FOLDER: Final = "heads"  # beside the catalogue's
FORMAT: Final = b"1"
TABLES: Final = (
    "meta",
    "heads",  # number of an instance -> its row
    "firsts",  # series -> the head that was kept first of it
    "first_of",  # number of the instance that this is of -> series
)
MAP_BYTES: Final = 64 << 20
LEVEL: Final = 6  # of compression
DIGEST_BYTES: Final = 8
WINDOW: Final = 32 << 10  # of the dictionary no more is looked at
KEY_BYTES: Final = 8
READ_BYTES: Final = 4 << 20  # of a copy; whole blocks


class _Row(msgspec.Struct, frozen=True, array_like=True):
    """`digest`: how that of the instance begins; `first`: which one it was compressed with."""

    digest: bytes
    first: int
    left_out: tuple[int, ...]
    data: bytes


class _First(msgspec.Struct, frozen=True, array_like=True):
    """`seq`: of the instance that it is the head of, with which it goes."""

    seq: int
    study: str
    series: str
    data: bytes


_row, _first = msgspec.msgpack.Decoder(_Row).decode, msgspec.msgpack.Decoder(_First).decode
_encode = msgspec.msgpack.Encoder().encode


def key_of(seq: int) -> bytes:
    return seq.to_bytes(KEY_BYTES, "big")


def _series_key(study: str, series: str, transfer_syntax: str) -> bytes:
    return xxhash.xxh3_128_digest("\0".join((study, series, transfer_syntax)).encode())


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
            first = txn.get("firsts", _series_key(put.study, put.series, put.transfer_syntax))
        if not row.data:
            return Kept(b"", row.left_out)
        if first is None or (made := _first(first)).seq != row.first:
            return None
        try:
            return Kept(_unpacked(row.data, zlib.decompress(made.data)), row.left_out)
        except zlib.error:
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
        """What isn't of this version, or can't be opened, is begun anew. Raises OSError."""
        try:
            kv = LmdbKv(folder, MAP_BYTES, TABLES)
            with kv.read() as txn:
                is_ours = txn.get("meta", b"format") == FORMAT
            if not is_ours:
                kv.close()
        except (CatalogueDamaged, OSError):
            is_ours = False
        if not is_ours:
            shutil.rmtree(folder, ignore_errors=True)
            kv = LmdbKv(folder, MAP_BYTES, TABLES)
            kv.update(lambda txn: txn.put("meta", b"format", FORMAT))
        super().__init__(kv)
        self._kv: LmdbKv = kv
        kv.forget_readers()

    @property
    def last(self) -> int:
        """The newest instance that has one; 0: none."""
        with self._kv.read() as txn:
            key = txn.last_key("heads")
        return int.from_bytes(key, "big") if key else 0

    def said(self, start: int, limit: int) -> list[tuple[int, bytes, int]]:
        """(number, how the digest begins, with which first one it was compressed; 0 for none) of some instances that
        have one. Raises msgspec.DecodeError for a damaged one."""
        with self._kv.read() as txn:
            rows = [(key, _row(value)) for key, value in islice(txn.scan("heads", key_of(start)), limit)]
        return [(int.from_bytes(key, "big"), row.digest, row.first) for key, row in rows]

    def first_of_series(self, study: str, series: str, transfer_syntax: str) -> int:
        """Which instance's head was kept first of a series; 0: none."""
        with self._kv.read() as txn:
            raw = txn.get("firsts", _series_key(study, series, transfer_syntax))
        return _first(raw).seq if raw is not None else 0

    def series(self, start: bytes, limit: int) -> list[tuple[bytes, str, str]]:
        """(key, study, series) of some of which the first is kept."""
        with self._kv.read() as txn:
            rows = islice(txn.scan("firsts", start), limit)
            return [(key, (one := _first(value)).study, one.series) for key, value in rows]

    def check(self, start: bytes, limit: int) -> bytes:
        """Some of the firsts; returns where to go on, b"" at the end. Raises zlib.error, msgspec.DecodeError."""
        last = b""
        with self._kv.read() as txn:
            for key, value in islice(txn.scan("firsts", start), limit):
                made, last = _first(value), key
                zlib.decompress(made.data)
                if txn.get("first_of", key_of(made.seq)) != key:
                    raise zlib.error("the first of a series isn't noted")
        return last and last + b"\0"

    def change(self, kept: Sequence[tuple[int, Put, Kept]], gone: Sequence[int], series: Sequence[bytes] = ()) -> None:
        """Keep some, and forget some instances, and series by their keys; durable as a whole."""
        self._kv.update(lambda txn: self._change(txn, kept, gone, series))

    def _change(
        self, txn: Transaction, kept: Sequence[tuple[int, Put, Kept]], gone: Sequence[int], series: Sequence[bytes]
    ) -> None:
        for seq in gone:
            txn.delete("heads", key_of(seq))
            _forget_first(txn, txn.get("first_of", key_of(seq)))
        for key in series:
            _forget_first(txn, key)
        firsts: dict[bytes, tuple[int, bytes]] = {}
        for seq, put, head in kept:
            key = _series_key(put.study, put.series, put.transfer_syntax)
            if head.data and key not in firsts:
                found = _known(txn.get("firsts", key))
                if found is None:
                    _forget_first(txn, key)
                    made = _First(seq, put.study, put.series, zlib.compress(head.data, LEVEL))
                    txn.put("firsts", key, _encode(made))
                    txn.put("first_of", key_of(seq), key)
                    firsts[key] = seq, head.data
                else:
                    firsts[key] = found
            first, dictionary = firsts[key] if head.data else (0, b"")
            data = _packed(head.data, dictionary) if head.data else b""
            row = _Row(put.digest[:DIGEST_BYTES], first, head.left_out, data)
            txn.append("heads", key_of(seq), _encode(row))

    @property
    def size_bytes(self) -> int:
        """What they take on the disk."""
        return self._kv.size_bytes


def _known(raw: bytes | None) -> tuple[int, bytes] | None:
    """Number and head of a first one; None also for a damaged one."""
    try:
        return ((made := _first(raw)).seq, zlib.decompress(made.data)) if raw is not None else None
    except (zlib.error, msgspec.DecodeError):
        return None


def _forget_first(txn: Transaction, series: bytes | None) -> None:
    """Those that were compressed with it are made anew, by who goes through all."""
    if series is not None and (raw := txn.get("firsts", series)) is not None:
        known = _known(raw)
        if known is not None:
            txn.delete("first_of", key_of(known[0]))
        txn.delete("firsts", series)


def _packed(data: bytes, first: bytes) -> bytes:
    packer = zlib.compressobj(LEVEL, zdict=first[-WINDOW:])
    return packer.compress(data) + packer.flush()


def _unpacked(data: bytes, first: bytes) -> bytes:
    """Raises zlib.error also for another dictionary than it was packed with."""
    unpacker = zlib.decompressobj(zdict=first[-WINDOW:])
    unpacked = unpacker.decompress(data)
    if not unpacker.eof:  # then its checksum wasn't looked at
        raise zlib.error("cut short")
    return unpacked


def beginning(volume: Path, location: Location, put: Put) -> bytes | None:
    """The first bytes of a copy's data set, or all of it, as they were stored; None if they can't be had. Blocks."""
    for name in (f"archive/{location.path}" if location.path else "", f"spool/{location.spool}"):
        try:
            if name:
                with (volume / name).open("rb", buffering=0) as file:
                    file.seek(put.offset)
                    data = file.read(READ_BYTES)
                break
        except OSError:
            continue
    else:
        return None
    if put.length - put.offset <= READ_BYTES:
        return data if xxhash.xxh3_128_digest(data) == put.digest else None
    return data if len(data) == READ_BYTES and put.blocks and are_good(put.blocks, 0, data) else None


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
